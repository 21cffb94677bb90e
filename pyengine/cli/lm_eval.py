"""lm-eval: tasks of lm-evaluation-harness."""

from __future__ import annotations

import json

from ..errors import InputError
from ..optional import require
from .options import add_arithmetic, add_json, add_model, load_model, new_command, positive


def add_commands(commands):
    parser = new_command(
        commands,
        "lm-eval",
        _lm_eval,
        "Run tasks of lm-evaluation-harness on the engine, without a server between. Tasks are the harness's "
        "own, whose data it fetches, or YAML files with data of this machine.",
    )
    add_model(parser)
    parser.add_argument(
        "--tasks", required=True, metavar="A,B", help="names of tasks, or YAML files, separated by commas"
    )
    parser.add_argument(
        "--include-path",
        metavar="DIR",
        help="a directory with the YAML files of further tasks (default: none)",
    )
    parser.add_argument(
        "--num-fewshot", type=int, metavar="N", help="examples before each question (default: the task's)"
    )
    parser.add_argument(
        "--limit", type=positive, metavar="N", help="the first N documents of each task (default: all)"
    )
    parser.add_argument(
        "--max-length",
        type=positive,
        metavar="N",
        help="tokens of a context and its continuation (default: what the model was made for)",
    )
    parser.add_argument(
        "--apply-chat-template", action="store_true", help="put the questions through the chat template"
    )
    parser.add_argument("--system-instruction", metavar="TEXT", help="a system message (default: none)")
    add_arithmetic(parser)
    add_json(parser, "the harness's results")


def _lm_eval(options):
    for module in ("lm_eval", "lm_eval.tasks"):
        require(module, extra="lm-eval", what="lm-eval", package="lm-eval")
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import handle_non_serializable, make_table

    from ..evaluation.lm_eval import PyengineLM

    tasks = options.tasks.split(",")
    manager = TaskManager(include_path=options.include_path)
    unknown = [task for task in tasks if not manager.match_tasks([task]) and not task.endswith(".yaml")]
    if unknown:
        raise InputError(
            f"--tasks: want tasks of lm-evaluation-harness or YAML files, got {', '.join(unknown)}"
        )
    results = simple_evaluate(
        model=PyengineLM(load_model(options), options.max_length),
        tasks=tasks,
        task_manager=manager,
        num_fewshot=options.num_fewshot,
        limit=options.limit,
        apply_chat_template=options.apply_chat_template,
        system_instruction=options.system_instruction,
        log_samples=False,
    )
    if options.json:
        print(json.dumps(results, default=handle_non_serializable, indent=2))
    else:
        print(make_table(results))
