import pytest
import torch
from torch import nn

from recipe_lib.objectives.critic import ModalityCritic, critic_loss, gradient_penalty


@pytest.fixture
def rows():
    return torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture
def critic():
    torch.manual_seed(0)
    return ModalityCritic(8).double()


def test_the_penalty_is_that_of_slopes_by_finite_differences(critic, rows):
    """Row by row, coordinate by coordinate, at points of known shares."""
    share = torch.linspace(0.1, 0.9, 5, dtype=torch.float64)[:, None]
    penalties = []
    for real, fake, s in zip(*rows, share, strict=True):
        point, slope = s * real + (1 - s) * fake, []
        for axis in torch.eye(8, dtype=torch.float64) * 1e-6:
            above, below = critic((point + axis)[None]), critic((point - axis)[None])
            slope.append((above - below).item() / 2e-6)
        penalties.append((torch.tensor(slope).square().sum().sqrt() - 1) ** 2)
    expected = float(torch.stack(penalties).mean())
    assert float(gradient_penalty(critic, *rows, share)) == pytest.approx(expected, rel=1e-6)


def test_the_penalty_of_a_plane_is_known_and_trains_it(rows):
    plane = nn.Linear(8, 1, bias=False).double()
    nn.init.constant_(plane.weight, 1.0)  # slope sqrt(8) everywhere
    penalty = gradient_penalty(plane, *rows)
    length = 8**0.5
    assert float(penalty) == pytest.approx((length - 1) ** 2)
    penalty.backward()
    # d (|w| - 1)^2 / dw = 2 (|w| - 1) w / |w|
    torch.testing.assert_close(plane.weight.grad, torch.full((1, 8), 2 * (length - 1) / length, dtype=torch.float64))


def test_a_critic_learns_the_distance_and_touches_no_row(critic, rows):
    real, fake = (x.float().requires_grad_() for x in (rows[0] + 3, rows[1]))
    critic = critic.float()
    optimizer = torch.optim.Adam(critic.parameters(), 1e-2)
    for step in range(60):
        loss, gap, slope = critic_loss(critic, real, fake)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if not step:
            first = gap
    assert real.grad is fake.grad is None
    assert gap > 3 * first.abs() and slope < 0.5, "it tells them apart with slopes near 1"
    assert float(loss) == pytest.approx(float(10 * slope - gap), rel=1e-5)


@pytest.mark.parametrize("alike", [True, False])
def test_one_row_and_rows_without_a_difference_are_finite(critic, rows, alike):
    real, fake = (rows[0], rows[0]) if alike else rows[:, :1]
    critic = critic.float()
    loss, _, slope = critic_loss(critic, real, fake)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(slope)
    assert all(torch.isfinite(p.grad).all() for p in critic.parameters() if p.grad is not None)


def test_sizes_are_acmes():
    assert sum(p.numel() for p in ModalityCritic(1024).parameters()) == 1024 * 512 + 512 + 512 * 256 + 256 + 256 + 1
