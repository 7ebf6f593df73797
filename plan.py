r"""How models are best divided among ranks: layouts of each role and phase, bytes and seconds.

    python plan.py --model_type llama-2-70b --critic_model_type llama-2-7b --gpus 64 --gpu h100 \
        --task ppo --batch 512 --prompt_length 1024 --response_length 1024 --out plan.yaml
    torchrun … ppo_train.py --config plan.yaml …
    python plan.py --calibrate machine.yaml    # what this machine reaches, for --hardware
    python plan.py --check                     # small real cases beside what is predicted

No weights are read. The cost model, what it assumes, and how right it is: docs/planning.md.
"""

from functools import partial

from src.cli import run
from src.settings.plan import PlanSettings


def main(settings: PlanSettings) -> None:
    """Search, or measure this machine."""
    from src.inputs import check_writable
    from src.planner.calibrate import calibrated, ranks_here
    from src.planner.check import check
    from src.planner.inputs import hardware_of, planned_job
    from src.planner.report import assumptions, lines_of, write_flags
    from src.planner.search import best_plans, check_something_fits

    machine, output = settings.machine, settings.output
    for path in filter(None, (output.calibrate, output.out)):
        check_writable(path, ".yaml")
    if output.check:
        return check(machine.gpus)
    if output.calibrate is not None:
        hardware = calibrated(machine.gpus or ranks_here())
        hardware.write(output.calibrate, "measured by plan.py --calibrate")
        print("\n".join([*assumptions(hardware), f"written to {output.calibrate}"]))
        return None

    # Everything that there is, and the quickest of what fits.
    assert machine.gpus is not None
    hardware = hardware_of(machine, settings.job.dtype)
    job = planned_job(settings, hardware)
    plans = best_plans(job, hardware, machine.gpus, output.best)
    check_something_fits(plans, job, hardware, machine.gpus)
    lines = assumptions(hardware) + [""]
    for number, plan in enumerate(plans, 1):
        lines += lines_of(job, plan, hardware, machine.gpus, number)
    if output.out is not None:
        write_flags(output.out, job, plans[0], machine.gpus)
        lines += [f"flags of the first written to {output.out}"]
    print("\n".join(lines))
    return None


command = partial(run, main)

if __name__ == "__main__":
    command()
