"""The options of all commands of `hp-edit`, read from their parsers."""

import argparse
import importlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

from hp_edit_trl.cli import FAMILIES, Commands, OneLineParser
from hp_edit_trl.scripts import ScriptParser
from hp_edit_trl.scripts.plan import PlanArguments, PlanParser


# Options of transformers and TRL that recipes set
COMMON = (
    "model_name_or_path", "model_revision", "dataset_name", "dataset_config", "dataset_train_split",
    "dataset_test_split", "output_dir", "max_steps", "num_train_epochs", "eval_strategy", "eval_steps", "save_steps",
    "save_total_limit", "resume_from_checkpoint", "seed", "report_to", "run_name", "push_to_hub", "hub_model_id",
    "use_cpu",
)  # fmt: skip


def parsers() -> dict[str, dict[str, argparse.ArgumentParser]]:
    """The parser of each command, by family. A training command's is that of its script."""
    found: dict[str, dict[str, argparse.ArgumentParser]] = {}
    for title, family in FAMILIES.items():
        commands = Commands(OneLineParser("hp-edit"))
        family.register(commands)
        found[title] = dict(commands.parsers.choices)
        for name, parser in found[title].items():
            if "words" in parser._defaults:  # it hands its words on to a parser of its own
                own = _script_parser(name)
                own.description = parser.description
                found[title][name] = own
    return found


def _script_parser(name: str) -> ScriptParser:
    if name == "plan":
        return PlanParser("plan", (PlanArguments,))
    return ScriptParser(name, importlib.import_module(f"hp_edit_trl.scripts.{name.replace('-', '_')}").ARGUMENTS)


def reference() -> str:
    """The reference of all commands, in Markdown."""
    return "\n".join(
        line
        for title, family in parsers().items()
        for line in (f"## {title}", "", *(part for name, parser in family.items() for part in _command(name, parser)))
    )


def _command(name: str, parser: argparse.ArgumentParser) -> Iterator[str]:
    yield from (f"### `hp-edit {name}`", "", str(parser.description), "")
    own, others = [], []
    for action in parser._actions:
        is_opposite = any(option.startswith("--no_") for option in action.option_strings)
        if not isinstance(action, argparse._HelpAction) and action.help is not argparse.SUPPRESS and not is_opposite:
            (own if _is_own(action, parser) else others).append(action)
    own.sort(key=lambda action: COMMON.index(action.dest) if others and action.dest in COMMON else len(COMMON))
    words = [a.metavar or a.dest for a in own if not a.option_strings]
    needed = [f"{a.option_strings[0]} {_value(a)}" for a in own if a.option_strings and a.required]
    usage = [f"hp-edit {name}", *map(str, words), *needed, "[OPTIONS]"]
    if name == "plan":
        usage.append("[OPTIONS OF THE TRAINING COMMAND]")
    yield from ("```text", " ".join(usage), "```", "")
    yield from ('<div class="doc-contents" markdown>', "")
    for action in own:
        yield from (f"{_name(action)}{_default(action)}", f":   {_help(action)}", "")
    yield from ("</div>", "")
    if others:
        yield '??? note "Options of transformers and TRL"'
        yield "    Described in the documentation of these libraries, and by `hp-edit " + name + " --help`:"
        yield "    " + ", ".join(f"`{action.option_strings[0]}`" for action in others) + "."
        yield ""


def _is_own(action: argparse.Action, parser: argparse.ArgumentParser) -> bool:
    """Whether an option belongs to a class of this package, or is a common one."""
    for kind in getattr(parser, "dataclass_types", ()):
        if any(
            action.dest in vars(part).get("__annotations__", {})
            for part in kind.__mro__
            if part.__module__.startswith("hp_edit_trl.")
        ):
            return True
    return action.dest in ("config", *COMMON) or not hasattr(parser, "dataclass_types")


def _name(action: argparse.Action) -> str:
    if not action.option_strings:
        return f"`{action.dest}`"
    value = _value(action)
    return f"`{action.option_strings[0]}`" + (f" `{value}`" if value else "")


def _value(action: argparse.Action) -> str:
    """What stands behind an option."""
    if action.nargs == 0:
        return ""
    if action.choices is not None:
        return "|".join(map(str, action.choices))
    if action.metavar is not None:
        return str(action.metavar)
    if getattr(action.type, "__name__", "") == "string_to_bool":
        return "true|false"
    return {int: "INT", float: "FLOAT"}.get(action.type, "VALUE")  # type: ignore[call-overload]


def _default(action: argparse.Action) -> str:
    value: Any = action.default
    if action.required or not action.option_strings and action.nargs not in ("?", "*"):
        return ", needed"
    if value is None or value is argparse.SUPPRESS or value == [] or action.nargs == 0 and value is False:
        return ""
    shown = " ".join(map(str, value)) if isinstance(value, Sequence) and not isinstance(value, str) else str(value)
    return f", defaults to `{shown}`" if shown.strip() else f', defaults to `"{shown}"`'


def _help(action: argparse.Action) -> str:
    text = (action.help or "").replace("%%", "%")
    text = text and text[0].upper() + text[1:].rstrip(".") + "."
    parts = text.split("`")
    parts[::2] = [re.sub(r"([_*<\[])", r"\\\1", part) for part in parts[::2]]  # what is no code
    return "`".join(parts)
