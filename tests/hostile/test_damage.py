"""What has a hash is found when it is damaged."""

import random

import pytest

from .damage import KINDS, damage


@pytest.mark.parametrize("kind", KINDS)
def test_damage_is_found_in_every_file_that_has_a_hash(kind):
    result = damage(kind, random.Random(0))
    assert result.done >= 3 and result.found == result.done, result.missed
