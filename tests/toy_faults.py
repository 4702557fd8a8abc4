"""A recipe whose loss goes wrong at chosen steps, for whatever model."""

import dataclasses

import numpy as np

from realm_retro.train.recipe import Live


def poisoned(recipe, steps):
    """The recipe with a loss that is multiplied by 1 + a number of the batch.

    Args:
      recipe: any.
      steps: step, from 1 → the number, such as NaN, in the first row of its batch; it
        is 0 in all others.
    """

    def spoil(step, batch):
        rows = len(next(iter(batch.values())))
        poison = np.zeros(rows, np.float32)
        poison[0] = steps.get(step + 1, 0)
        return {**batch, "poison": poison}

    def loss(params, batch, key):
        total, weight, further = recipe.loss(params, batch, key)
        return total * (1 + batch["poison"].sum()), weight, further

    made = recipe.batch_at
    if isinstance(made, Live):
        batch_at = dataclasses.replace(
            made, batch=lambda step, found: spoil(step, made.batch(step, found))
        )
    else:

        def batch_at(step):
            return spoil(step, made(step))

    spec = {**recipe.batch_spec, "poison": ("batch",)}
    return dataclasses.replace(recipe, loss=loss, batch_at=batch_at, batch_spec=spec)
