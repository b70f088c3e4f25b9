"""The `flower-*` commands in a text, held against the real command lines."""

import importlib
import re
import shlex
from functools import cache

import click
import typer

MODULES = {"flower-server": "server.cli", "flower-client": "client.cli", "flower-simulate": "simulations.cli"}
SERVICES = {"server": "flower-server", "hospital": "flower-client"}
_NAMED = re.compile(r"`(flower-(?:server|client|simulate) [^`]+)`")


@cache
def group(name):
    """The click group of one of the three commands."""
    return typer.main.get_command(importlib.import_module(MODULES[name]).app)


def subcommand(name, words):
    """The command that `words` name, its own words, and its context."""
    command, context = group(name), None
    words = list(words)
    while hasattr(command, "commands"):
        context = click.Context(command, info_name=name, parent=context)
        chosen = next((word for word in words if not word.startswith("-")), None)
        if chosen is None:
            return command, words, context
        if chosen not in command.commands:
            raise click.UsageError(f"{name} has no command {chosen}")
        words.remove(chosen)
        command = command.commands[chosen]
    return command, words, context


def parse_command(words):
    """Parse a whole command line as the program would, without running it. Raises click.UsageError."""
    command, rest, context = subcommand(words[0], words[1:])
    command.make_context(command.name, list(rest), parent=context)


def mentioned(text):
    """Commands in `inline code`, as lists of words."""
    for match in _NAMED.finditer(text):
        yield match[1].split()


def check_mention(words):
    """Subcommand and options exist, whatever else the sentence says. Raises click.UsageError."""
    known, name = [], words[0]
    words = [word for word in words if word != "NAME"]
    command = group(name)
    for word in words[1:]:
        if hasattr(command, "commands"):
            if word not in command.commands:
                raise click.UsageError(f"{name} has no command {word}")
            command = command.commands[word]
            known = [option for parameter in command.params for option in parameter.opts]
        elif word.startswith("--") and word not in [*known, "--help", "--debug"]:
            raise click.UsageError(f"{name} {command.name} has no option {word}")


def shell_blocks(text):
    """The ```bash blocks of a page, in order."""
    return re.findall(r"^```bash\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def commands(block):
    """Our command lines in a shell block: sudo, containers and paths taken away."""
    for line in block.replace("\\\n", " ").splitlines():
        for part in re.split(r"&&|\|\||[;|]", line.split(" #")[0]):
            # A heredoc's Python has quotes of its own.
            words = shlex.split(part.split(" > ")[0], comments=True) if part.count('"') % 2 == 0 else []
            if words[:2] == ["docker", "compose"]:
                yield from _in_container(words)
                continue
            for index, word in enumerate(words):
                if _is_program(word) and not _is_an_argument(words, index):
                    yield [word.rpartition("/")[2], *words[index + 1 :]]
                    break


def _is_program(word):
    return word in MODULES or (word.rpartition("/")[2] in MODULES and "/bin/" in word)


def _in_container(words):
    verb = next((index for index, word in enumerate(words) if word in {"run", "exec"}), None)
    if verb is None or "--entrypoint" in words:
        return
    service = next(index for index in range(verb, len(words)) if words[index] in SERVICES)
    rest = words[service + 1 :]
    if words[verb] == "run":
        yield [SERVICES[words[service]], *rest]
    elif _is_program(rest[0]):
        yield rest


def _is_an_argument(words, index):
    """`useradd flower-client`, `systemctl start flower-server`, `-u flower-client`: users and units."""
    first = next((word for word in words if word not in {"sudo", "-H"}), "")
    takes_names = {"useradd", "systemctl", "journalctl", "install", "echo"}
    return first in takes_names or (index > 0 and words[index - 1] in {"-u", "-g", "-o"})
