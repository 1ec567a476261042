"""The short form of the fault campaign."""
from faults import campaign


def test_nothing_is_lost(tmp_path):
    assert campaign.main(["--quick", "--folder", str(tmp_path)]) == 0
