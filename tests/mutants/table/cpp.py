"""Mutants of the ops in csrc/cpu/."""

from tests.mutants.mutant import Mutant, of_file

CPP = "tests/backends/cpu/test_cpp.py"
BUDGET = f"{CPP}::test_error_is_within_its_budget -k"
REFUSED = f"{CPP}::test_patches_out_of_range_are_refused_before_anything_is_written"

MUTANTS = (
    *of_file(
        "csrc/cpu/adam_clamp_kernel.h",
        f"{BUDGET} adam_clamp",
        Mutant(
            "cpp-adam-eps",
            "* step.root + step.eps)",
            "* step.root)",
            "A pixel without gradient becomes NaN.",
        ),
        Mutant(
            "cpp-adam-nan",
            "moved < low ? low : moved",
            "moved > low ? moved : low",
            "A NaN becomes the lower bound.",
            f"{CPP}::test_a_nan_in_a_gradient_reaches_the_pixels",
        ),
    ),
    *of_file(
        "csrc/cpu/adam_clamp.cpp",
        f"{BUDGET} adam_clamp",
        Mutant(
            "cpp-adam-bound",
            "next - at, step,\n             lowest[channel], highest[channel]);",
            "next - at, step,\n             lowest[channel], highest[0]);",
            "Active patches take the upper bound of the first channel.",
        ),
        Mutant(
            "cpp-adam-decay",
            "(1 - lr * weight_decay)",
            "(1 - weight_decay)",
            "Pixels decay at the same rate whatever the learning rate is.",
        ),
        Mutant(
            "cpp-adam-check",
            "(images.size(2) / patch_size) * (images.size(3) / patch_size));",
            "(images.size(2) / patch_size) * (images.size(3) / patch_size) + 1);",
            "A patch after the last is written.",
            f"{REFUSED} -k adam_clamp",
        ),
        Mutant(
            "cpp-adam-strides",
            "if (!exp_avg_sq.is_contiguous()) torch::stable::copy_(exp_avg_sq, v);",
            "",
            "A strided second moment keeps its old values.",
        ),
    ),
    *of_file(
        "csrc/cpu/batch_norm_matching.cpp",
        f"{BUDGET} batch_norm",
        Mutant(
            "cpp-norm-merge",
            "squares += other.squares + distance * distance * count * other.count / total;",
            "squares += other.squares;",
            "The variance between blocks of pixels is lost.",
        ),
        Mutant(
            "cpp-norm-eps",
            "std::sqrt(static_cast<double>(var[c]) + eps)",
            "std::sqrt(static_cast<double>(var[c]))",
            "A recorded variance of zero divides by zero.",
        ),
    ),
    *of_file(
        "csrc/cpu/gather_sigmoid_patches.cpp",
        f"{BUDGET} gather_sigmoid_patches",
        Mutant(
            "cpp-sigmoid-patches-mirrored-background",
            "window.flip ? run.x + run.count - x - pixels : x - run.x",
            "x - run.x",
            "A mirrored window shows its frozen pixels on the wrong side.",
        ),
        Mutant(
            "cpp-sigmoid-patches-frozen-gradient",
            "std::fill_n(out + start, pixels, T{0});",
            "std::fill_n(out + start, 0, T{0});",
            "Frozen pixels have a gradient.",
        ),
    ),
    *of_file(
        "csrc/cpu/gather_sigmoid_patches_kernel.h",
        f"{BUDGET} gather_sigmoid_patches",
        Mutant(
            "cpp-sigmoid-patches-overflow",
            "return exp_of_negative<T>(x < T{0} ? x : -x);",
            "return exp_of_negative<T>(x);",
            "Pixels that are nearly white are not.",
        ),
        Mutant(
            "cpp-sigmoid-patches-last-vector",
            "if (i == count) return;",
            "return;",
            "The pixels after the last whole vector keep the values of the field.",
        ),
    ),
    *of_file(
        "csrc/cpu/patch_windows.h",
        f"{BUDGET} gather_patches",
        Mutant(
            "cpp-patches-landing-cell",
            "(mirrored ? columns - 1 - column : column)",
            "column",
            "A mirrored patch keeps the position that it had before.",
        ),
        Mutant(
            "cpp-patches-wrapped-run",
            "flip ? size_ - first : 0, first",
            "0, first",
            "A mirrored window that wraps around the image has its halves in the wrong order.",
        ),
        Mutant(
            "cpp-patches-jitter-of-each",
            "pixels[image * shift.stride(0)]",
            "pixels[0]",
            "Every image is shifted down as the first is.",
        ),
        Mutant(
            "cpp-patches-flip-of-each",
            "flips[image * flip.stride(0)]",
            "flips[0]",
            "Every image is mirrored as the first is.",
        ),
        Mutant(
            "cpp-patches-sort",
            "std::sort(found.begin(), found.end()",
            "std::sort(found.begin(), found.begin()",
            "The gradient of a window that wrapped around is overwritten by zeros.",
        ),
        Mutant(
            "cpp-patches-rest-of-row",
            "std::fill(row + written, row + width_, T{0});",
            "",
            "Pixels to the right of the last window have no gradient at all.",
            f"{CPP}::test_every_element_of_a_result_is_written",
        ),
    ),
    *of_file(
        "csrc/cpu/total_variation.cpp",
        f"{BUDGET} total_variation",
        Mutant(
            "cpp-variation-norm",
            "norm > 0 ? *grad_l2.const_data_ptr<T>() / norm : 0",
            "*grad_l2.const_data_ptr<T>() / norm",
            "A constant image has a NaN as its gradient.",
        ),
        Mutant(
            "cpp-variation-repeated",
            "if (!is_active) cells_.push_back(values[i]);",
            "cells_.push_back(values[i]);",
            "A patch that repeats, as where a batch is ragged, counts more than once.",
        ),
        Mutant(
            "cpp-variation-signs",
            "return slope.per_count != 0;",
            "return slope.per_count > 0;",
            "A negative gradient of the sum of absolute differences is dropped.",
            "tests/ops/test_total_variation.py::test_total_variation_gradient",
        ),
        Mutant(
            "cpp-variation-last-band",
            "std::min(top + band_rows_, grid_.height), grid_.width",
            "std::min(top + band_rows_, grid_.height - 1), grid_.width",
            "The last row isn't set to zero before gradients are added to it.",
            f"{CPP}::test_every_element_of_a_result_is_written",
        ),
    ),
    *of_file(
        "csrc/cpu/total_variation_cells.h",
        f"{BUDGET} total_variation",
        Mutant(
            "cpp-variation-border",
            "if (cells.is_active[r * grid.columns + c]) continue;",
            "",
            "Differences between two active patches count twice.",
        ),
        Mutant(
            "cpp-variation-inside",
            "return {0, 1, height - 1, width - 1};",
            "return {0, 1, height - 1, width};",
            "The last column is compared with the next row.",
        ),
    ),
    *of_file(
        "csrc/cpu/total_variation_kernel.h",
        f"{BUDGET} total_variation",
        Mutant(
            "cpp-variation-first-row",
            "const Slopes<T>& up_right = is_first ? none : slopes[3];",
            "const Slopes<T>& up_right = slopes[3];",
            "The first row has a gradient from the row above it, which isn't there.",
        ),
        Mutant(
            "cpp-variation-corner",
            "if (i + kLanes == count) ahead[kLanes - 1] = 0;",
            "",
            "The corner of a neighbouring patch counts twice.",
        ),
    ),
    *of_file(
        "csrc/cpu/gather_attention.cpp",
        f"{BUDGET} gather_attention",
        Mutant(
            "cpp-attention-rest",
            "std::fill_n(own + i * head.out_stride, head.width, S{});",
            "",
            "Rows after the length of an image are not written.",
            f"{CPP}::test_every_element_of_a_result_is_written",
        ),
        Mutant(
            "cpp-attention-lengths",
            "std::clamp<int64_t>(length, 0, count_)",
            "std::min<int64_t>(length, count_)",
            "A negative length reaches the kernel.",
        ),
        Mutant(
            "cpp-attention-heads",
            "head_importance[(i / count * heads + h) * count + i % count]",
            "head_importance[(i / count * heads) * count + i % count]",
            "Importance is that of the first head.",
        ),
    ),
    *of_file(
        "csrc/cpu/gather_attention_kernel.h",
        f"{BUDGET} gather_attention",
        Mutant(
            "cpp-attention-largest",
            "highest[v] = score > highest[v] ? score : highest[v];",
            "highest[v] = score > highest[v] ? highest[v] : score;",
            "The smallest score is subtracted, and exponentials overflow.",
        ),
        Mutant(
            "cpp-attention-first-block",
            "if (importance && begin == 0) {",
            "if (importance) {",
            "Importance is that of the first query of the last block of queries.",
        ),
        Mutant(
            "cpp-attention-sum-of-values",
            "queries, {begin ? w.d_v : nullptr, w.width});",
            "queries, {nullptr, w.width});",
            "The gradient of the values is that of the last block of queries.",
        ),
        Mutant(
            "cpp-attention-scale",
            "((load<V>(d_p + at) - sum) * scale)",
            "(load<V>(d_p + at) * scale - sum)",
            "The mean of the gradient is subtracted without its scale.",
        ),
    ),
    *of_file(
        "csrc/cpu/recycled_memory.cpp",
        f"{CPP}::test_memory_of_a_large_result_is_given_out_again_once_it_is_free",
        Mutant(
            "cpp-memory",
            "blocks_.erase(block);\n        held_ -= bytes;",
            "held_ -= bytes;",
            "Two results have the same memory.",
        ),
    ),
)
