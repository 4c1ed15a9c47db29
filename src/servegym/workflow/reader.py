"""Reading a workflow from a file of any known kind."""

from __future__ import annotations

from pathlib import Path

from servegym.documents import load_json
from servegym.workflow.dag_file import dag_from_document
from servegym.workflow.graph import Workflow, WorkflowError
from servegym.workflow.jobshop import job_shop_from_text
from servegym.workflow.wfformat import Fleet, workflow_from_wfformat


def read_workflow(path: Path, fleet: Fleet | None = None) -> Workflow:
    """Read a DAG (`servegym-dag-1`), a WfFormat record or a job shop; the content says which.

    Args:
        path: The file.
        fleet: Devices for WfFormat, which names none; None: the usual ones.

    Raises:
        WorkflowError: If the file cannot be read, its content is wrong, or it names devices itself
            and a fleet is given.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise WorkflowError(f"{path} cannot be read: {reason}") from error
    if not text.lstrip().startswith(("{", "[")):
        _refuse_fleet(path, fleet)
        return job_shop_from_text(text, path.name)
    try:
        document = load_json(text)
    except (ValueError, RecursionError) as error:
        raise WorkflowError(f"{path.name} is not JSON: {error}") from error
    if isinstance(document, dict) and "workflow" in document:
        return workflow_from_wfformat(document, path.name, fleet or Fleet())
    if not isinstance(document, dict) or "schema" not in document:
        raise WorkflowError(
            f'{path.name} must be an object with "schema": "servegym-dag-1", or WfFormat'
        )
    _refuse_fleet(path, fleet)
    return dag_from_document(document, path.name)


def _refuse_fleet(path: Path, fleet: Fleet | None) -> None:
    if fleet is not None:
        raise WorkflowError(
            f"{path.name} names its own devices: speeds and links are for WfFormat, leave them out"
        )
