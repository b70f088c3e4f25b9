"""Mutants of the row gradients: norms, rows that fill a chunk up, layers without a gradient for each row."""

import math

import torch

import client.training.patient_optimizer as optimiser
import client.training.per_row_layers as layers
import client.training.private as training
import client.training.row_gradients as row_gradients
from client.training.row_gradients import DenseRows, ProductRows, Units
from tests.audit.mutants import mutant


def rows_alone(count):
    return Units.of(torch.arange(count), count, rows=count)


def with_norms_of_products(patch, change):
    """Let `change(squared norms of rows, units)` give those of the units, for gradients held as factors."""
    real = ProductRows.squared_norms
    patch.setattr(
        ProductRows,
        "squared_norms",
        lambda self, units: change(real(self, rows_alone(self.rows)), units),
    )


@mutant("handling", caught_by="neighbours")
def norms_of_one_row_for_all_of_a_patient(patch):
    """Where factors are held, the norm of a patient is that of the first image, whatever the others are."""

    def of_first(squared, units):
        found = torch.zeros_like(squared)
        for row in reversed(range(len(squared))):
            found[units.slots[row]] = squared[row]
        return found

    with_norms_of_products(patch, of_first)


@mutant("handling", caught_by="neighbours")
def cross_terms_of_a_patients_rows_forgotten(patch):
    """Where factors are held, squared norms of a patient's rows are added up as if at right angles."""
    with_norms_of_products(
        patch, lambda squared, units: torch.zeros_like(squared).index_add_(0, units.slots, squared)
    )


@mutant("handling", caught_by="neighbours")
def products_that_cancel_are_taken_at_their_word(patch):
    """Norms from factors are not kept above a share of their terms, so that rounding decides on the clip."""
    patch.setattr(row_gradients, "LARGEST_COHERENCE", math.inf)


@mutant("handling", caught_by="neighbours")
def norms_in_float32_over_a_whole_layer(patch):
    """Squares of a layer's gradient are added in float32 from the first weight to the last."""
    patch.setattr(
        row_gradients,
        "squared_norms",
        lambda values: torch.linalg.vector_norm(values, dim=1).double().square(),
    )


@mutant("handling", caught_by="neighbours")
def a_clip_is_taken_that_float32_cannot_square(patch):
    """A server may ask for any clip, also one below which squares of gradients vanish."""
    patch.setattr(optimiser, "_SMALLEST_CLIP", 0.0)


@mutant("handling", caught_by="neighbours")
def a_layer_falls_back_to_the_gradient_of_the_batch(patch):
    """Biases and norms have a share of the whole batch's gradient in place of a gradient for each row."""
    real = layers.keep

    def keep(parameter, rows):
        real(parameter, rows)
        found = getattr(parameter, "grad_sample", None)
        if isinstance(found, DenseRows) and parameter.dim() == 1:
            whole = found.contents().mean(dim=0, keepdim=True)
            parameter.grad_sample = DenseRows(whole.repeat(found.rows, 1))

    patch.setattr(layers, "keep", keep)


@mutant("handling", caught_by="neighbours")
def rows_that_fill_a_chunk_up_are_counted(patch):
    """Each black row that only fills a chunk up is taken for a patient."""
    real = training.accumulate_clipped_gradients

    def counting(*arguments, inputs, segments, num_units, **others):
        more = torch.arange(num_units, num_units + len(inputs) - len(segments))
        real(
            *arguments,
            inputs=inputs,
            segments=torch.cat([segments, more]),
            num_units=num_units + len(more),
            **others,
        )

    patch.setattr(training, "accumulate_clipped_gradients", counting)
