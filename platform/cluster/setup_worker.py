"""Start a worker of Ray: set the variables of its runtime environment, and become the worker.

    python setup_worker.py default_worker.py OPTION ...     with the options of Ray's own script of this name

The raylet runs this file instead of Ray's own, which first imports Ray: half a CPU second for each worker. What else a
runtime environment may contain, for example a container, is left to Ray's own. The name must stay: the raylet
recognizes the script by it, and skips it for workers without a runtime environment.
"""

import json
import os
import re
import sys

CONTEXT, LANGUAGE = "--serialized-runtime-env-context=", "--language="
HANDLED = {"env_vars", "py_executable"}
"""Contents of a runtime environment that this file handles."""


def command(words: list[str], variables: dict[str, str]) -> list[str]:
    """Return the command of the worker, given the arguments of this script, and change `variables` for it."""
    language = [word.removeprefix(LANGUAGE) for word in words if word.startswith(LANGUAGE)]
    contexts = [json.loads(word.removeprefix(CONTEXT)) for word in words if word.startswith(CONTEXT)]
    context = contexts[0] if len(contexts) == 1 else {}
    python = context.get("py_executable") or sys.executable
    other = {name for name, value in context.items() if value} - HANDLED
    if language != ["PYTHON"] or len(contexts) != 1 or other or not os.path.isfile(python):
        return [sys.executable, _of_ray(), *words]
    for name, value in (context.get("env_vars") or {}).items():
        variables[name] = _expanded(value, variables)
    return [python, *(word for word in words if not word.startswith((CONTEXT, LANGUAGE)))]


def _expanded(value: str, variables: dict[str, str]) -> str:
    """Replace $NAME and ${NAME} as Ray does: unknown names in braces become empty, others stay."""

    def found(match: re.Match[str]) -> str:
        return variables.get(match[1] or match[2], match[0])

    return re.sub(r"\$\{[A-Z0-9_]+\}", "", re.sub(r"\$(?:(\w+)|\{([^}]*)\})", found, value, flags=re.ASCII))


def _of_ray() -> str:
    """Return the path of Ray's own script, without importing Ray."""
    from importlib.util import find_spec  # not at the top: nearly no worker needs it

    spec = find_spec("ray")
    assert spec is not None
    assert spec.origin is not None
    return os.path.join(os.path.dirname(spec.origin), "_private", "workers", "setup_worker.py")


if __name__ == "__main__":
    found = command(sys.argv[1:], os.environ)  # type: ignore[arg-type]
    os.execv(found[0], found)
