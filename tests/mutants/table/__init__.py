"""Every mutant, by the room that its file is in."""

from tests.mutants.table import (
    cpp,
    cuda,
    engine,
    inversion,
    objectives,
    ops,
    outer,
    schedules,
    teacher,
    triton,
)

MUTANTS = (
    *ops.MUTANTS,
    *cpp.MUTANTS,
    *cuda.MUTANTS,
    *triton.MUTANTS,
    *engine.MUTANTS,
    *teacher.MUTANTS,
    *schedules.MUTANTS,
    *inversion.MUTANTS,
    *objectives.MUTANTS,
    *outer.MUTANTS,
)
