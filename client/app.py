"""The ClientApp: what a hospital does with each message, top to bottom.

Read next: `client/round.py` (one round), `client/release.py` (the one door out), `common/messages.py`.
"""

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from client.answering import answered
from client.closing import keep_model
from client.evaluation import evaluate_model
from client.introduction import introduce
from client.round import train_round

app = ClientApp()


@app.query("hello")
def hello(request: Message, context: Context) -> Message:
    """Say who this hospital is: public facts only."""
    return answered(introduce, request, context)


@app.train()
def train(request: Message, context: Context) -> Message:
    """Train one round under the hospital's policy and answer with the sealed update."""
    return answered(train_round, request, context)


@app.evaluate()
def evaluate(request: Message, context: Context) -> Message:
    """Score a model on the validation patients and answer with noised, charged counts."""
    return answered(evaluate_model, request, context)


@app.query("closing")
def closing(request: Message, context: Context) -> Message:
    """Keep the finished model and confirm which one it is."""
    return answered(keep_model, request, context)
