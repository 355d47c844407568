"""Every mutant, by the room that its file is in."""

from tests.mutants.table import (
    cpp,
    cuda,
    engine,
    inversion,
    kept_tokens,
    objectives,
    ops,
    outer,
    parametrizations,
    pool,
    precision,
    remote,
    schedules,
    teacher,
    triton,
    triton_steps,
)

MUTANTS = (
    *ops.MUTANTS,
    *cpp.MUTANTS,
    *cuda.MUTANTS,
    *triton.MUTANTS,
    *triton_steps.MUTANTS,
    *engine.MUTANTS,
    *precision.MUTANTS,
    *teacher.MUTANTS,
    *kept_tokens.MUTANTS,
    *schedules.MUTANTS,
    *parametrizations.MUTANTS,
    *inversion.MUTANTS,
    *objectives.MUTANTS,
    *pool.MUTANTS,
    *remote.MUTANTS,
    *outer.MUTANTS,
)
