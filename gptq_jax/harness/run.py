"""Tasks of the harness on a model, in one call."""

from collections.abc import Sequence
from os import PathLike
from typing import Any

MISSING = "tasks are run by lm-evaluation-harness, which is not here: pip install 'gptq-jax[eval]'."


def check_harness() -> None:
    """Raise ImportError, with the remedy, if lm-evaluation-harness is not installed."""
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise ImportError(MISSING) from error


def run_tasks(
    model: Any,
    tasks: Sequence[str],
    *,
    task_path: str | PathLike[str] | None = None,
    few_shot: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    chat: bool = False,
) -> dict[str, dict[str, Any]]:
    """Each task's metrics, as the harness has them.

    Args:
        model: what `load` takes, or a model.
        tasks: names; most of the harness's own read data sets of the Hugging Face Hub.
        task_path: a folder with YAML files of more tasks.
        few_shot: examples before each question; None: as the task says.
        limit: only so many questions of each task.
        batch_size: requests at a time.
        chat: put questions into the tokenizer's chat template.

    Raises:
        ImportError: lm-evaluation-harness is missing.
        ValueError: there is no such task.
    """
    check_harness()
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from gptq_jax.harness.model import HarnessModel

    manager = TaskManager(include_path=None if task_path is None else str(task_path))
    if unknown := sorted(set(tasks) - set(manager.all_tasks)):
        where = "" if task_path is None else f" or in {task_path}"
        raise ValueError(f"there are no tasks {unknown} in the harness{where}: `lm_eval ls tasks` lists its own.")
    found = simple_evaluate(
        model=HarnessModel(model, batch_size=batch_size),
        tasks=list(tasks),
        num_fewshot=few_shot,
        limit=limit,
        apply_chat_template=chat,
        task_manager=manager,
        log_samples=False,
    )
    assert found is not None  # it is None in all processes but the first
    return {name: dict(each) for name, each in found["results"].items()}
