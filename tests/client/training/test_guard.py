import pytest
import torch
from opacus.grad_sample import GradSampleModule, GradSampleModuleNoOp
from torch import nn

from client.training.guard import guard_losses, guard_model, guard_optimizer
from client.training.patient_optimizer import PatientDPOptimizer
from client.training.plain import make_optimizer
from client.training.private import per_row_gradients
from common.config import TrainingConfig
from common.errors import BatchNormError, GuardError
from common.models.registry import build_model, model_names
from common.privacy.randomness import SecureRandomness
from common.tasks import Classification, make_task
from tests.client.training.dp_oracle import (
    TASK,
    accumulate_all,
    clipped_sum,
    make_dp_optimizer,
    make_plan,
    random_rows,
    small_network,
    summed,
)
from tests.model_names import shape_of, spec_of

SHAPE = (1, 8, 8)


@pytest.mark.parametrize("name", model_names())
def test_every_model_of_the_registry_passes(name):
    spec = spec_of(name, num_outputs=3)
    model = build_model(spec)
    state = torch.get_rng_state()
    guard_model(model, input_shape=shape_of(spec))
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in model.modules())


@pytest.mark.parametrize("classes", ["ab", "abcde"])
def test_classification_passes(classes):
    guard_losses(make_task("classification", classes))
    guard_losses(make_task("classification", classes, class_weights=range(1, len(classes) + 1)))


def with_layer(layer, channels=4):
    return nn.Sequential(
        nn.Conv2d(1, channels, 3, padding=1), layer, nn.Flatten(), nn.Linear(channels * 64, 2)
    )


class OwnConv(nn.Conv2d):
    pass


class OwnScale(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return x * self.scale


class BatchCentred(nn.Module):
    """Couples records without a parameter or a known name."""

    def forward(self, x):
        return x - x.mean(dim=0)


class Remembering(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("brightest", torch.zeros(()))

    def forward(self, x):
        self.brightest = torch.maximum(self.brightest, x.max().detach())
        return x


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.shared = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        return self.shared(torch.tanh(self.shared(x)))


class Unused(nn.Identity):
    def __init__(self):
        super().__init__()
        self.idle = nn.Linear(3, 3)


def tied():
    first, second = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
    second.weight = first.weight
    return nn.Sequential(first, nn.Tanh(), second)


def buffered():
    layer = nn.Conv2d(4, 4, 3, padding=1)
    layer.register_buffer("seen", torch.zeros(3))
    return layer


def frozen_batch_norm():
    return nn.BatchNorm2d(4).requires_grad_(False)


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        pytest.param(nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), "pad with zeros", id="T10"),
        pytest.param(OwnConv(4, 4, 3, padding=1), "per-row gradient: 1 .OwnConv", id="subclass"),
        pytest.param(OwnScale(), "per-row gradient: 1 .OwnScale", id="unknown layer"),
        pytest.param(nn.InstanceNorm2d(4, affine=True), "per-row gradient", id="unverified layer"),
        pytest.param(nn.ReLU(inplace=True), "in place: 1 .ReLU", id="in place"),
        pytest.param(nn.Dropout(0.1), "random generator: 1 .Dropout", id="dropout"),
        pytest.param(nn.Conv2d(4, 4, 3, padding=1).eval(), "evaluation mode: 1 .Conv2d", id="evaluation"),
        pytest.param(buffered(), "buffers: 1 .Conv2d", id="buffer in a trainable layer"),
        pytest.param(Remembering(), "buffers change .*1.brightest", id="buffer that changes"),
        pytest.param(BatchCentred(), "depends on another record", id="T4 by behaviour"),
        pytest.param(Twice(), "exactly once .*1.shared .2 times", id="layer used twice"),
        pytest.param(Unused(), "exactly once .*1.idle .0 times", id="layer never used"),
        pytest.param(tied(), "shared: 1.0.weight = 1.2.weight", id="tied parameters"),
        pytest.param(
            nn.Conv2d(4, 4, 3, padding=1).to(memory_format=torch.channels_last),
            "channels-last order: 1 .Conv2d",
            id="channels last",
        ),
    ],
)
def test_layers_that_void_the_guarantee_are_refused_by_name(layer, words):
    with pytest.raises(GuardError, match=words) as caught:
        guard_model(with_layer(layer), input_shape=SHAPE)
    assert caught.value.why
    assert caught.value.fix


@pytest.mark.parametrize(
    "layer",
    [
        nn.BatchNorm2d(4),
        nn.BatchNorm2d(4, affine=False),
        nn.BatchNorm2d(4, track_running_stats=False),
        frozen_batch_norm(),
        nn.SyncBatchNorm(4),
        nn.InstanceNorm2d(4, track_running_stats=True),
    ],
)
def test_trap_4_batch_norm_is_refused_whatever_its_parameters(layer):
    with pytest.raises(BatchNormError, match=type(layer).__name__):
        guard_model(with_layer(layer), input_shape=SHAPE)


def test_a_model_prepared_twice_is_refused():
    with (
        per_row_gradients(small_network()) as wrapped,
        pytest.raises(GuardError, match="already prepared"),
    ):
        guard_model(wrapped, input_shape=SHAPE)


class MeanLoss(Classification):
    """T5: the usual class-weighted mean."""

    def losses(self, outputs, targets):
        return nn.functional.cross_entropy(outputs, targets, weight=torch.tensor([1.0, 20.0]))


class SpreadMeanLoss(Classification):
    """T5: looks like losses per record, is divided by the batch's weights."""

    def losses(self, outputs, targets):
        weights = torch.tensor([1.0, 20.0])[targets]
        return nn.functional.cross_entropy(outputs, targets, reduction="none") * weights / weights.sum()


class RankingLoss(Classification):
    """T5: an AUC surrogate, pairs of records."""

    def losses(self, outputs, targets):
        score = outputs[:, 1] - outputs[:, 0]
        pairs = torch.sigmoid(score[None, :] - score[:, None]) * (targets[:, None] > targets[None, :])
        return pairs.mean(dim=1)


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (MeanLoss, "expected .4,"),
        (SpreadMeanLoss, "depends on other records"),
        (RankingLoss, "depends on other records"),
    ],
)
def test_trap_5_losses_that_couple_records_are_refused(loss, words):
    with pytest.raises(GuardError, match=words):
        guard_losses(loss(classes=("negative", "positive")))


def assert_refused(optimizer, model, words, plan=None):
    with pytest.raises(GuardError, match=words):
        guard_optimizer(optimizer, model, plan or make_plan())


def test_our_own_pair_passes():
    for optimizer in ("sgd", "adam"):
        model = small_network()
        with per_row_gradients(model) as wrapped:
            own = make_dp_optimizer(model, make_plan(), training=TrainingConfig(optimizer=optimizer))
            guard_optimizer(own, wrapped, make_plan())


def test_traps_1_and_3_ghost_modes_are_refused():
    from opacus.grad_sample import GradSampleModuleFastGradientClipping
    from opacus.optimizers import DPOptimizerFastGradientClipping

    model = small_network()
    ghost = GradSampleModuleFastGradientClipping(model, max_grad_norm=1.0, use_ghost_clipping=True)
    assert_refused(make_dp_optimizer(model, make_plan()), ghost, "our per-row gradients")
    optimizer = DPOptimizerFastGradientClipping(
        make_optimizer(model.parameters(), TrainingConfig(), learning_rate=0.1),
        noise_multiplier=1.5,
        max_grad_norm=1.0,
        expected_batch_size=10,
    )
    with per_row_gradients(small_network()) as wrapped:
        assert_refused(optimizer, wrapped, "clip patients")


def test_layers_whose_gradient_is_that_of_the_whole_batch_are_refused():
    model = small_network()
    with per_row_gradients(model) as wrapped:
        optimizer = make_dp_optimizer(model, make_plan())
        guard_optimizer(optimizer, wrapped, make_plan())
        del model[4].forward
        assert_refused(optimizer, wrapped, "summed over the rows")
    assert_refused(optimizer, GradSampleModuleNoOp(small_network(), loss_reduction="sum"), "summed over")


def test_mean_losses_and_functorch_are_refused():
    model = small_network()
    assert_refused(make_dp_optimizer(model, make_plan()), GradSampleModule(model), "our per-row gradients")
    model = small_network()
    wrapped = GradSampleModule(model, loss_reduction="sum", force_functorch=True)
    assert_refused(make_dp_optimizer(model, make_plan()), wrapped, "our per-row gradients")


def test_trap_2_numbers_other_than_the_plans_are_refused():
    model = small_network()
    with per_row_gradients(model) as wrapped:
        for other in (dict(l2_clip_norm=0.01), dict(noise_multiplier=0.5), dict(steps=7)):
            assert_refused(make_dp_optimizer(model, make_plan(**other)), wrapped, "other numbers")


def test_trap_6_a_regulariser_in_the_loss_reaches_nothing():
    # Task.losses sees outputs only. Were it to add a constant that depends on the weights, autograd's own
    # gradient of the weights is never formed, and weight decay in the wrapped optimiser is refused.
    model = small_network()
    inputs, targets = random_rows([0, 1, 2])

    class Regularised(Classification):
        def losses(self, outputs, targets):
            penalty = sum(parameter.square().sum() for parameter in model.parameters())
            return super().losses(outputs, targets) + 1000 * penalty

    task = Regularised(classes=TASK.classes)
    with_penalty = clipped_sum(model, inputs, targets, [0, 1, 2], task=task)
    assert torch.equal(with_penalty, clipped_sum(model, inputs, targets, [0, 1, 2]))
    with per_row_gradients(model) as wrapped:
        decaying = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
        optimizer = PatientDPOptimizer(
            decaying, plan=make_plan(), randomness=SecureRandomness(), round_number=1
        )
        assert_refused(optimizer, wrapped, "weight decay")


def test_trap_7_leftovers_of_an_unfinished_batch_are_refused_and_never_released():
    from opacus.utils.batch_memory_manager import BatchMemoryManager

    model = small_network()
    inputs, targets = random_rows([0, 1, 2])
    with per_row_gradients(model) as wrapped:
        optimizer = make_dp_optimizer(model, make_plan())
        accumulate_all(wrapped, optimizer, inputs, targets, [0, 1, 2], max_rows=2)
        assert_refused(optimizer, wrapped, "left over")
        # A fresh optimiser, as every round makes one, starts with nothing.
        fresh = make_dp_optimizer(model, make_plan())
        guard_optimizer(fresh, wrapped, make_plan())
        assert summed(model).norm() == 0
        fresh._step_skip_queue.append(True)
        assert_refused(fresh, wrapped, "left over")
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(inputs, targets), batch_size=3)
    with (
        BatchMemoryManager(
            data_loader=loader, max_physical_batch_size=2, optimizer=make_dp_optimizer(model, make_plan())
        ) as batches,
        pytest.raises(GuardError, match="BatchMemoryManager"),
    ):
        next(iter(batches))


def test_an_optimizer_of_an_earlier_round_is_refused():
    model = small_network()
    with per_row_gradients(model) as wrapped:
        optimizer = make_dp_optimizer(model, make_plan(steps=3))
        optimizer.step()
        assert_refused(optimizer, wrapped, "earlier round", make_plan(steps=3))


def test_trap_11_adaptive_clipping_is_refused():
    from opacus.optimizers.adaclipoptimizer import AdaClipDPOptimizer

    model = small_network()
    optimizer = AdaClipDPOptimizer(
        make_optimizer(model.parameters(), TrainingConfig(), learning_rate=0.1),
        noise_multiplier=1.5,
        max_grad_norm=1.0,
        expected_batch_size=10,
        target_unclipped_quantile=0.5,
        clipbound_learning_rate=0.2,
        max_clipbound=2.0,
        min_clipbound=0.5,
        unclipped_num_std=1.0,
    )
    with per_row_gradients(model) as wrapped:
        assert_refused(optimizer, wrapped, "AdaClipDPOptimizer")


def test_a_forgotten_or_foreign_parameter_is_refused():
    model, other = small_network(), small_network()
    with per_row_gradients(model) as wrapped:
        assert_refused(make_dp_optimizer(other, make_plan()), wrapped, "exactly")
        some = make_optimizer(list(model.parameters())[1:], TrainingConfig(), learning_rate=0.1)
        optimizer = PatientDPOptimizer(some, plan=make_plan(), randomness=SecureRandomness(), round_number=1)
        assert_refused(optimizer, wrapped, "exactly")
