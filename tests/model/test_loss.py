import pytest
import torch
from torch.nn import functional

from dlrm.config import LossConfig
from dlrm.errors import UserError
from dlrm.model.loss import mean_loss, probabilities

LOGITS = torch.tensor([-2.0, 0.0, 3.0, 1.0])
LABELS = torch.tensor([0.0, 1.0, 1.0, 0.0])
SIGMOIDS = torch.sigmoid(LOGITS)


def test_bce_is_the_cross_entropy_of_the_probability() -> None:
    expected = functional.binary_cross_entropy(SIGMOIDS, LABELS)
    torch.testing.assert_close(mean_loss(LOGITS, LABELS, LossConfig()), expected)


def test_bce_stays_finite_for_extreme_logits() -> None:
    loss = mean_loss(torch.tensor([1000.0]), torch.tensor([0.0]), LossConfig())
    assert loss.item() == 1000


def test_wbce_weighs_rows_by_label_and_takes_the_plain_mean() -> None:
    config = LossConfig(loss="wbce", loss_weights=(0.4, 1.6))
    each = functional.binary_cross_entropy(SIGMOIDS, LABELS, reduction="none")
    expected = (0.4 * each[0] + 1.6 * each[1] + 1.6 * each[2] + 0.4 * each[3]) / 4
    torch.testing.assert_close(mean_loss(LOGITS, LABELS, config), expected)


def test_mse_is_of_the_probability() -> None:
    expected = ((SIGMOIDS - LABELS) ** 2).mean()
    torch.testing.assert_close(mean_loss(LOGITS, LABELS, LossConfig(loss="mse")), expected)


@pytest.mark.parametrize("loss", ["bce", "wbce", "mse"])
def test_the_threshold_clamps_probabilities_in_every_loss(loss: str) -> None:
    config = LossConfig(loss=loss, loss_threshold=0.3)  # type: ignore[arg-type]
    clamped = SIGMOIDS.clamp(0.3, 0.7)
    assert torch.equal(probabilities(LOGITS, config), clamped)
    expected = (
        ((clamped - LABELS) ** 2).mean()
        if loss == "mse"
        else functional.binary_cross_entropy(clamped, LABELS)
    )
    torch.testing.assert_close(mean_loss(LOGITS, LABELS, config), expected)


def test_a_threshold_of_half_or_more_is_refused() -> None:
    with pytest.raises(UserError, match=r"\[0, 0.5\); got 0.5"):
        LossConfig(loss_threshold=0.5)
