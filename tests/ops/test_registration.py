import torch

from mambastyle.ops.registration import constant_result


def test_constant_results_are_marked_as_torch_marks_them():
    def ours():
        return 1

    def theirs():
        return 1

    assert vars(constant_result(ours)) == vars(torch.compiler.assume_constant_result(theirs)) != {}
