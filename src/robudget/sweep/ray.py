"""Many runs on a cluster: one Ray task a run, over a store that every node sees (a shared file system).

As in `local`, nothing is remembered that is not on the disk; a node that fails loses at most an epoch. Ray is an
optional dependency, imported only here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from robudget.errors import InputError
from robudget.execution import Site
from robudget.recipe import Recipe
from robudget.store import Store
from robudget.sweep.executor import Job, run_job
from robudget.sweep.queue import SweepState

MAX_RETRIES = 3  # of a task whose node was lost; a run goes on from its checkpoint


def sweep_on_ray(
    recipes: Sequence[Recipe],
    *,
    store: str | Path,
    site: Site | None = None,
    address: str | None = None,
    gpus_per_run: float = 1.0,
    cpus_per_run: float = 1.0,
    watch: Callable[[SweepState], None] = lambda state: None,
) -> SweepState:
    """Run what is not done yet on the Ray cluster at `address` (None: the running one, else this machine).

    `store` must be an absolute path on a file system that all nodes share; `watch` gets the state every second. Raises
    InputError where Ray is not installed.
    """
    try:
        import ray
    except ImportError:
        raise InputError("ray is not installed (pip install 'robudget[ray]')") from None
    home = Store(Path(store).absolute())
    state = SweepState.begin(recipes, home)
    watch(state)
    if not state.to_do:
        return state
    if not ray.is_initialized():
        ray.init(address=address, log_to_driver=False, include_dashboard=False)
    task = ray.remote(num_gpus=gpus_per_run, num_cpus=cpus_per_run, max_retries=MAX_RETRIES)(run_job)
    place = (site or Site()).model_dump()
    pending = {task.remote(Job(recipes[i].to_dict(), str(home.root), place).to_dict()): i for i in state.to_do}
    while pending:
        ready, _ = ray.wait(list(pending), timeout=1.0)
        for reference in ready:
            index = pending.pop(reference)
            try:
                state.finish(index, ray.get(reference))
            except ray.exceptions.RayTaskError as error:
                state.fail(index, str(error.cause))
            except ray.exceptions.RayError as error:  # the node, not the run
                state.fail(index, str(error).strip().splitlines()[0])
        watch(state)
    return state
