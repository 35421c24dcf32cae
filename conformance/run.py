"""Run an implementation of SafeDPO against vectors.json (docs/conformance.md).

    python -m conformance.run MODULE

MODULE, a Python module, has some of the functions that vectors.json lists, by those names. They
take and return plain lists, numbers and dictionaries.
"""

import importlib
import json
import math
import sys
from pathlib import Path

CONTENT = json.loads((Path(__file__).parent / "vectors.json").read_text(encoding="utf-8"))


def agrees(found, expected):
    """Whether two results are the same, numbers within the tolerance."""
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(agrees(found[k], expected[k]) for k in found)
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(agrees, found, expected))
    if isinstance(expected, (int, float)):
        return math.isclose(found, expected, rel_tol=CONTENT["tolerance"], abs_tol=1e-9)
    return found == expected


def failures(functions):
    """[(a vector, what was found instead)] of those that some of these, {name: function}, fail."""
    failed = []
    for vector in CONTENT["vectors"]:
        if vector["of"] in functions:
            try:
                found = functions[vector["of"]](**vector["given"])
                passed = agrees(found, vector["expected"])
            except Exception as error:  # whatever an implementation does, the next vector is tried
                found, passed = repr(error), False
            if not passed:
                failed.append((vector, found))
    return failed


def main(name):
    try:
        module = importlib.import_module(name)
    except (ImportError, TypeError, ValueError) as error:
        return f"{name}: cannot be imported ({error}); expected a name such as conformance.ours"
    functions = {of: getattr(module, of) for of in CONTENT["functions"] if hasattr(module, of)}
    missing = ", ".join(of for of in CONTENT["functions"] if of not in functions)
    if not functions:
        return f"{name}: has none of the functions {', '.join(CONTENT['functions'])}"
    failed = failures(functions)
    for vector, found in failed:
        print(f"{vector['of']}: {vector['name']}: {found}, expected {vector['expected']}")
    tried = sum(vector["of"] in functions for vector in CONTENT["vectors"])
    print(f"{tried - len(failed)} of {tried} vectors passed: {', '.join(functions)}")
    if missing:
        print(f"not tried, because {name} lacks it: {missing}")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]) if len(sys.argv) == 2 else __doc__)
