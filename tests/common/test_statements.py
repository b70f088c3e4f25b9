import json

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from common.errors import ConfigError
from common.statements import sign_statement, verify_statement

KEY = ec.generate_private_key(ec.SECP384R1())
CONTENT = {"epsilon": 1.25, "hospital": "St. Élise", "rounds": [1, 2]}


def test_a_statement_says_what_was_signed_and_by_whom():
    statement = verify_statement(sign_statement(KEY, kind="ledger", content=CONTENT))
    assert (statement.kind, statement.content) == ("ledger", CONTENT)
    assert statement.fingerprint.startswith("SHA256:")


def test_reformatting_changes_nothing():
    text = sign_statement(KEY, kind="ledger", content=CONTENT)
    assert verify_statement(json.dumps(json.loads(text), indent=7)).content == CONTENT


@pytest.mark.parametrize("change", ["content", "kind", "public_key", "signature", "schema"])
def test_a_changed_statement_is_refused(change):
    document = json.loads(sign_statement(KEY, kind="ledger", content=CONTENT))
    other = json.loads(
        sign_statement(ec.generate_private_key(ec.SECP384R1()), kind="other", content={"epsilon": 1.24})
    )
    document[change] = other[change] if change != "schema" else 2
    with pytest.raises(ConfigError, match="no valid signed statement"):
        verify_statement(json.dumps(document))


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", "x", '{"schema": 1}'])
def test_what_is_no_statement_is_refused(text):
    with pytest.raises(ConfigError, match="no valid signed statement"):
        verify_statement(text)
