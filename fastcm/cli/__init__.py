"""The command line: one module per command, one line per error, one exit code per kind of error.

A command is a module `fastcm/cli/<command>.py` with `add(subparsers)`, which declares the options, and `run(args) -> int | None`.
In: words. Out: files, lines on the terminal, an exit code. The work itself is done by the rooms below.
Nothing here and nothing at the top of a command module imports torch: `fastcm --help` answers at once.
"""

import argparse
import errno
import importlib
import importlib.util
import io
import os
import re
import sys
import traceback
from collections.abc import Sequence
from importlib import metadata
from types import ModuleType

import fastcm
from fastcm.errors import InputError, PeerError, RunError, check_given, nearest, reason_of

COMMANDS = ("train", "sample", "edit", "evaluate", "export", "convert", "average", "serve", "info", "bench")
EXIT_INPUT, EXIT_RUN, EXIT_INTERRUPT, EXIT_PIPE = 2, 1, 130, 141
MOST_CHARACTERS = 1000  # of a message
# What takes less memory, by the options that a command has.
LESS_MEMORY = {
    "train": "Use a smaller --batch, --microbatch or --precision bf16.",
    **dict.fromkeys(("sample", "edit", "evaluate", "serve"), "Use --precision bf16, or a machine with more."),
}
EXTRAS = {
    **dict.fromkeys(("onnx", "onnxscript", "onnxruntime"), "export"),
    **dict.fromkeys(("torchmetrics", "scipy"), "metrics"),
    **dict.fromkeys(("lpips", "torchvision"), "lpips"),
    "aiohttp": "serve",
    **dict.fromkeys(("datasets", "pyarrow"), "data"),
    "huggingface_hub": "hub",
    **dict.fromkeys(("pytest", "diffusers"), "test"),
}


class Parser(argparse.ArgumentParser):
    """argparse with errors in fastcm's words, raised as InputError; options are never abbreviated; `--debug` is known everywhere."""

    def __init__(self, *args, **options):
        super().__init__(*args, **{"allow_abbrev": False, "formatter_class": argparse.RawDescriptionHelpFormatter, **options})
        self.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error")

    def error(self, message: str):
        raise InputError(_rephrased(message, self.prog))

    def _check_value(self, action: argparse.Action, value: object) -> None:
        if action.choices is not None and value not in action.choices:
            choices = [str(choice) for choice in action.choices]
            where = "/".join(action.option_strings) or self.prog
            remedy = f"Choose from {', '.join(choices)}.{nearest(value, choices)}"
            raise InputError(f"unknown {action.dest.replace('_', '-')} in {where}: {value}. {remedy}")

    def _get_value(self, action: argparse.Action, text: str) -> object:
        if action.nargs != argparse.PARSER:  # which hands all that follows the command through
            check_given("/".join(action.option_strings) or str(action.metavar or action.dest), text)
        convert = self._registry_get("type", action.type, action.type)
        try:
            return convert(text)
        except InputError:
            raise  # argparse would replace its text by "invalid ... value"
        except argparse.ArgumentTypeError as error:
            raise argparse.ArgumentError(action, str(error)) from error
        except (TypeError, ValueError) as error:
            kind = {"int": "a whole number", "float": "a number"}.get(getattr(convert, "__name__", ""), "another form")
            raise InputError(f"invalid value in {'/'.join(action.option_strings) or action.dest}: {text}. Expected {kind}.") from error


def build_parser(command: str | None = None) -> Parser:
    """The parser with `command`'s options alone, or with those of every command if there is no such one."""
    parser = Parser(prog="fastcm", description="Train, run and ship consistency models: one network call per image.")
    parser.add_argument("--version", action="version", version=_version(), help="show the versions of fastcm, Python and torch")
    subparsers = parser.add_subparsers(dest="command", metavar="command")
    present = [name for name in COMMANDS if _is_present(name)]
    for name in (command,) if command in present else present:
        _module(name).add(subparsers)
    return parser


def _is_present(command: str) -> bool:
    return importlib.util.find_spec(f"fastcm.cli.{command}") is not None


def _module(command: str) -> ModuleType:
    return importlib.import_module(f"fastcm.cli.{command}")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0, 2 for input, 1 for run time, 130 after Ctrl-C. Errors are one line on stderr."""
    argv = list(sys.argv[1:] if argv is None else argv)
    _open_closed_streams()
    if isinstance(sys.stdout, io.TextIOWrapper):  # a name that the terminal's encoding lacks is no reason to fail
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = _dispatch(argv)
        sys.stdout.flush()
        return code
    except SystemExit as done:  # --help and --version
        return done.code if isinstance(done.code, int) else int(done.code is not None)
    except KeyboardInterrupt:
        _report("interrupted", debug=False, prefix="fastcm: ")
        return EXIT_INTERRUPT
    except BrokenPipeError:
        _leave_stdout()  # the reader of our output left (`fastcm info | head`)
        return EXIT_PIPE
    except Exception as error:
        if _was_interrupted(error):
            _report("interrupted", debug="--debug" in argv, prefix="fastcm: ")
            return EXIT_INTERRUPT
        code, message = _described(error, next((word for word in argv if word in COMMANDS), None))
        try:
            sys.stdout.flush()
        except OSError:  # a full disk under it, which is what the message says
            _leave_stdout()
        if not isinstance(error, PeerError):
            _report(message, debug="--debug" in argv)
        return _left(code)


def _open_closed_streams() -> None:
    """os.devnull in the place of standard streams that the caller closed (`fastcm info MODEL >&-`), before a file gets their number."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            stream = open(os.devnull, "r" if name == "stdin" else "w", encoding="utf-8")  # noqa: SIM115 - the process's own
            try:
                os.fstat(number)
            except OSError:
                os.dup2(stream.fileno(), number)
            setattr(sys, name, stream)


def _leave_stdout() -> None:
    """Points stdout elsewhere, or Python complains once more at its exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _was_interrupted(error: BaseException | None) -> bool:
    """Whether Ctrl-C is what a library's error came from."""
    seen = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, KeyboardInterrupt):
            return True
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return False


def _left(code: int) -> int:
    """The exit code; at once in one of several processes, where what waits for a lost one would hold the exit up."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _dispatch(argv: list[str]) -> int:
    try:
        args = _parsed(argv)
    except InputError as error:
        if os.environ.get("RANK", "0") != "0":  # every process was given the same options: the first says what is wrong with them
            raise PeerError(0, EXIT_INPUT) from error
        raise
    return EXIT_INPUT if args is None else _module(args.command).run(args) or 0


def _parsed(argv: list[str]) -> argparse.Namespace | None:
    """The options, checked; None, with the help on stderr, where no command was given."""
    command = next((word for word in argv if not word.startswith("-")), None)
    parser = build_parser(command)
    actions = _actions_of(parser, command)
    if all(action.nargs != argparse.REMAINDER for action in actions):
        # Before parsing: argparse takes the value of a misspelt option for a positional argument and complains of that.
        _refuse_unknown([word for word in argv if word.startswith("--") and word != "--"], actions, command)
    args, unknown = parser.parse_known_args(argv)
    _refuse_unknown(unknown, [], args.command)
    if args.command is None:
        parser.print_help(sys.stderr)
        return None
    return args


def _actions_of(parser: Parser, command: str | None) -> list[argparse.Action]:
    """The options of `fastcm` and of its `command`, if there is one of this name."""
    actions = list(parser._actions)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction) and command in action.choices:
            actions += action.choices[command]._actions
    return actions


def _refuse_unknown(words: list[str], actions: list[argparse.Action], command: str | None) -> None:
    """Raises InputError for the first of `words` that is no option of `actions`."""
    options = [option for action in actions for option in action.option_strings]
    for word in (word.split("=")[0] for word in words):
        if word not in options:
            kind = "option" if word.startswith("-") else "argument"
            where = f"fastcm {command}" if command in COMMANDS else "fastcm"
            raise InputError(f"unknown {kind} in {where}: {word}. See {where} --help.{nearest(word, options)}")


def _described(error: Exception, command: str | None = None) -> tuple[int, str]:
    """Exit code and one line for an error, whatever its kind."""
    text = " ".join(str(error).split())
    if len(text) > MOST_CHARACTERS:  # a value of any length was quoted: the remedy stands at the end
        text = f"{text[: MOST_CHARACTERS - 300]} ... {text[-300:]}"
    if isinstance(error, InputError):
        return EXIT_INPUT, text
    if isinstance(error, PeerError):
        return error.code, text
    if isinstance(error, RunError):
        return EXIT_RUN, text
    if isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] in EXTRAS:
        package = error.name.split(".")[0]
        return EXIT_RUN, f"missing package: {package}. pip install 'fastcm[{EXTRAS[package]}]'."
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return EXIT_RUN, f"no space left on the device for {error.filename or 'the output'}. Make room and run the same command again."
    if isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError | PermissionError | FileExistsError) and error.filename:
        return EXIT_INPUT, f"{(error.strerror or type(error).__name__).lower()}: {error.filename}. Check the path."
    if isinstance(error, OSError) and error.filename:
        return EXIT_RUN, f"{(error.strerror or type(error).__name__).lower()}: {error.filename}. Check the disk and the path."
    if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError):  # torch's class, named without importing torch
        what = reason_of(error).split(". ")[0] if text else "host memory"
        return EXIT_RUN, f"out of memory: {what}. {LESS_MEMORY.get(command, 'Free some and run it again.')}"
    return EXIT_RUN, f"unexpected {type(error).__name__}: {reason_of(error)}. Run again with --debug for the traceback."


def _report(message: str, *, debug: bool, prefix: str = "fastcm: error: ") -> None:
    if debug:
        traceback.print_exc()
    who = f"rank {os.environ['RANK']}: " if os.environ.get("WORLD_SIZE", "1") != "1" and "RANK" in os.environ else ""
    print(f"{prefix}{who}{message}", file=sys.stderr)


def _rephrased(message: str, prog: str) -> str:
    """argparse's own message as `<what> in <option>: <value>. <remedy>`."""
    if match := re.fullmatch(r"argument ([^:]+): expected (.+)", message):
        return f"missing value in {match[1]}: expected {match[2]}. See {prog} --help."
    if match := re.fullmatch(r"argument ([^:]+): not allowed with argument (.+)", message):
        return f"two options that exclude each other: {match[1]} and {match[2]}. Give one of them."
    if match := re.fullmatch(r"the following arguments are required: (.+)", message):
        return f"missing argument in {prog}: {match[1]}. See {prog} --help."
    if match := re.fullmatch(r"argument ([^:]+): (.+)", message):
        return f"invalid value in {match[1]}: {match[2]}"
    return f"{message}. See {prog} --help."


def _version() -> str:
    try:
        torch_version = metadata.version("torch")
    except metadata.PackageNotFoundError:
        torch_version = "missing"
    return f"fastcm {fastcm.__version__} (Python {sys.version.split()[0]}, torch {torch_version})"
