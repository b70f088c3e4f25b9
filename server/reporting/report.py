"""Write what a person reads into a run folder: `report.html`, `plots/*.png`, `MODEL_CARD.md`.

From the command line: `flower-server report runs/<run-id>`.
"""

from pathlib import Path

from common.files import write_bytes_atomically
from server.reporting.run_record import read_run

REPORT, MODEL_CARD = "report.html", "MODEL_CARD.md"


def write_report(folder: Path) -> Path:
    """(Re)write report, plots and model card from what the folder holds; returns the path of the report.

    Works at any time of a run: what is not known yet is said to be missing. Raises ConfigError when the
    folder is no run.
    """
    from server.reporting.model_card import model_card
    from server.reporting.page import page
    from server.reporting.plots import draw_plots, write_plots

    run = read_run(folder)
    plots = draw_plots(run)
    write_plots(folder, plots)
    write_bytes_atomically(folder / MODEL_CARD, model_card(run).encode())
    write_bytes_atomically(folder / REPORT, page(run, plots).encode())
    return folder / REPORT
