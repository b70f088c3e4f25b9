"""What a name, a fingerprint and an address look like, wherever they are typed or arrive."""

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
"""Of a federation or a hospital: safe as a file name and in a log."""
FINGERPRINT = r"^SHA256:[A-Za-z0-9+/]{43}$"
"""Of a key, as `ssh-keygen -l` prints it."""
ADDRESS = r"^(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+):\d{1,5}$"
"""host:port; an IPv6 address in brackets."""
