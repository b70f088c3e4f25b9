"""The ServerApp: what the operator's side does, top to bottom.

Read next: `server/round.py` (one round), `server/update_checks.py` (what is believed of a reply),
`common/messages.py` (what travels).
"""

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from common.config import FederationConfig
from common.settings import from_flat
from server.evaluation import evaluate_final
from server.run_folder import open_run_folder
from server.session import (
    begin,
    failures_recorded,
    finish,
    open_federation,
    restore,
    run_rounds,
    wait_for_quorum,
)

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation from where its run folder stands to its end."""
    # 1. Read the configuration; open the run folder, which no other server may be writing.
    config = from_flat(FederationConfig, context.run_config)
    with open_run_folder(config) as folder, failures_recorded(folder, config):
        # 2. Go on from the newest whole checkpoint, or begin with initial weights.
        state = restore(folder, config) or begin(folder, config)
        federation = open_federation(grid, folder, config, state)
        # 3. Wait for the hospitals: a patience, then a clear end, never for ever.
        status = wait_for_quorum(federation, state)
        # 4. Train the rounds that are left.
        if status is None:
            state, status = run_rounds(federation, state)
        # 5. Have the hospitals score the model on their validation patients: noised counts, charged to those.
        evaluate_final(federation, state, status)
        # 6. Leave model and result; hand the model to every hospital.
        finish(federation, state, status)
