"""Privacy that is switched off silently, whatever the optimiser does with its random numbers."""


class _Silence:
    """A stream that samples as ever and whose noise is zero."""

    def __init__(self, real):
        self._real = real

    def __getattr__(self, name):
        return getattr(self._real, name)

    def fill_normal(self, into, stddev=1.0):
        into[:] = 0

    def fill_integers(self, high, into):
        into[:] = high // 2  # the middle of what fills the gaps of the noise


def noiseless(monkeypatch, source):
    """Production randomness without any noise."""
    real = source.stream

    def stream(self, *, purpose, **where):
        drawn = real(self, purpose=purpose, **where)
        return _Silence(drawn) if purpose == "noise" else drawn

    monkeypatch.setattr(source, "stream", stream)
