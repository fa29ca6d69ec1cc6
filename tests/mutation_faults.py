"""The faults that mutation.py seeds, and the tests that should notice each."""

from __future__ import annotations

from dataclasses import dataclass

KERNELS = "csrc/kernels"
FORWARD, BACKWARD, SOFT, SOFT_MAP, MEMORY, VALUES, RUNTIME, SANITIZER, ROTARY, PATHS = (
    f"tests/gpu/test_gpu_{name}.py"
    for name in (
        *("forward", "backward", "soft", "soft_map"),
        *("memory", "values", "runtime", "sanitizer", "rotary", "paths"),
    )
)
INSTANCES = f"{FORWARD}::test_instance"
RACES = (f"{SANITIZER}::test_tool_reports_nothing[portable-racecheck]",)


@dataclass(frozen=True)
class Fault:
    """`old`, which occurs once in `file`, becomes `new`; `tests` should notice, or `fallback`."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...] = (INSTANCES,)
    fallback: tuple[str, ...] = ()

    @property
    def path(self) -> str:
        """SLA2_PATH of the tests: the kernels that hold the fault must run for it to show. The
        Hopper kernels are what auto takes, and they cannot serve every test alone."""
        return "auto" if "kernels/sm90/" in self.file else "portable"


OUTPUT, SOFTMAX, CONVERT, LAYOUT = (
    f"{KERNELS}/common/{name}.cuh" for name in ("attn_output", "softmax", "convert", "layout")
)
POOL, ROUTER, STATE, BWD_FINISH = (
    f"{KERNELS}/portable/{name}.cu" for name in ("pool", "router", "linear_state", "bwd_finish")
)
ATTENTION, QUERY, BWD_KEYS = (
    f"{KERNELS}/sm80/{name}.cuh" for name in ("attn_fwd", "attn_query", "bwd_columns_linear")
)
COMPLEMENT = f"{KERNELS}/sm80/complement.cu"
SOFT_PRODUCTS = f"{KERNELS}/sm80/soft_products.cu"
BWD_ROWS, BWD_COLUMNS, BWD_ROWS_SM90, BWD_COLUMNS_SM90 = (
    f"{KERNELS}/sm{arch}/bwd_{name}.cu" for arch in (80, 90) for name in ("rows", "columns")
)
ATTENTION_SM90, INPUTS_SM90, STORE_SM90 = (
    f"{KERNELS}/sm90/{name}.cuh" for name in ("attn_fwd", "attn_inputs", "row_store")
)
ROUTE_SM90 = f"{KERNELS}/sm90/router.cu"
SELECT_SM90, SPLIT_SM90, KEYS_SM90, LINEAR_SM90, STATE_SM90 = (
    f"{KERNELS}/sm90/{name}.cuh"
    for name in (
        *("router_select", "router_split"),
        *("linear_state", "linear_e4m3_tiles", "linear_e4m3_state"),
    )
)
ATTENTION_ROWS_SM90 = f"{KERNELS}/sm90/attn_rows.cu"
ROW_TILES_SM90, BF16_SM90 = (
    f"{KERNELS}/sm90/{name}.cuh" for name in ("row_tiles", "linear_bf16_tiles")
)
SOFT_TOP_K = f"{KERNELS}/portable/soft_top_k.cu"

FAULTS = (
    Fault(
        "tail mask dropped", ATTENTION,
        "if (is_short) mask_columns(s, p.shape.seqlen % kBlockK);", "",
    ),
    Fault(
        "gradient of the rotation is the rotation", f"{KERNELS}/portable/rotary.cu",
        "p.inverse ? -1.f : 1.f", "1.f",
        (f"{ROTARY}::test_gradient_is_the_inverse_rotation",),
    ),
    Fault(
        "every fourth head turned by the angles of the one before", f"{KERNELS}/portable/rotary.cu",
        "if (!shared && head > 0)", "if (!shared && i > 0)",
        (f"{ROTARY}::test_bits",),
    ),
    Fault(
        "one listed block too few", ATTENTION,
        "const int listed = p.counts[list];", "const int listed = p.counts[list] - 1;",
    ),
    Fault(
        "32-bit batch offset", CONVERT,
        "(bh / num_heads) * view.stride_batch",
        "static_cast<int>((bh / num_heads) * view.stride_batch)",
        (f"{MEMORY}::test_strides_beyond_2_to_31",),
    ),
    Fault(
        "barrier of the ring skipped", ATTENTION,
        "cp_async_wait<C::kStages - 2>();\n    __syncthreads();",
        "cp_async_wait<C::kStages - 2>();",
        (INSTANCES, f"{RUNTIME}::test_the_same_bits_250_times"), RACES,
    ),
    Fault(
        "wait for the ring's copies too short", ATTENTION,
        "cp_async_wait<C::kStages - 2>();", "cp_async_wait<C::kStages - 1>();",
        (INSTANCES, f"{RUNTIME}::test_the_same_bits_250_times"), RACES,
    ),
    Fault(
        "barrier of the pooling skipped", POOL,
        "__syncthreads();  // the previous reduction has been read", "",
        (f"{FORWARD}::test_router_scores", f"{RUNTIME}::test_the_same_bits_250_times"), RACES,
    ),
    Fault(
        "last row not written", QUERY,
        "if (row < rows) {", "if (row < rows - 1) {",
        (f"{MEMORY}::test_what_memory_held_does_not_matter",),
    ),
    Fault(
        "scale of V inverted", POOL,
        "scales[0] = is_e4m3 ? amax / kE4m3Max : power;",
        "scales[0] = is_e4m3 ? kE4m3Max / amax : 1.f / power;",
    ),
    Fault(
        "scale of another key block", ATTENTION,
        "scale = p.k_scale[static_cast<int64_t>(bh) * num_k_blocks + j];",
        "scale = p.k_scale[static_cast<int64_t>(bh) * num_k_blocks];",
    ),
    Fault(
        "eps of V's scale missing", POOL,
        "amax = fmaxf(amax, kQuantEps);", "",
        (f"{VALUES}::test_constant_channel", f"{VALUES}::test_zero_values"),
    ),
    Fault(
        "floor of the score scale missing", ATTENTION,
        "max_nan(block_scale * fabsf(factor), 1e-37f)", "block_scale * fabsf(factor)",
        (f"{VALUES}::test_equal_logits",),
    ),
    Fault(
        "row sums not rescaled", SOFTMAX,
        "row_sum[m][half] *= rescale;", "",
        (f"{VALUES}::test_saturated_softmax",),
    ),
    Fault(
        "maximum that loses NaN", CONVERT,
        'asm("max.NaN.f32 %0, %1, %2;"', 'asm("max.f32 %0, %1, %2;"',
        (f"{VALUES}::test_not_finite",),
    ),
    Fault(
        "ties to the highest index", ROUTER,
        "(equal && __popc(equal_mask & lanes_below) < equal_left)",
        "(equal && __popc(equal_mask & ~lanes_below) <= equal_left)",
        (f"{FORWARD}::test_ties_go_to_the_lowest_index",),
    ),
    Fault(
        "mean of a short query block", POOL,
        "sum / tokens;", "sum / kBlockQ;",
        (f"{FORWARD}::test_router_scores",),
    ),
    Fault(
        "mean of a short key block", ROUTER,
        "x = x / min(kBlockK, p.shape.seqlen - (first + r) * kBlockK) - mean;",
        "x = x / kBlockK - mean;",
        (f"{FORWARD}::test_router_scores",),
    ),
    Fault(
        "list entries followed blindly", ROUTER,
        "if (j < p.shape.num_k_blocks) atomicOr(", "atomicOr(",
        (f"{VALUES}::test_hostile_block_map",),
        (f"{SANITIZER}::test_tool_reports_nothing[portable-memcheck]",),
    ),
    Fault(
        "lse not corrected for smoothing", OUTPUT,
        "value - correction[m][half] * p.softmax_scale", "value",
    ),
    Fault(
        "block left in the complement", COMPLEMENT,
        "atomicAnd(&words[j / 32], ~(1u << mask_bit(j)));",
        "if (j % 8 != 5) atomicAnd(&words[j / 32], ~(1u << mask_bit(j)));",
        (f"{FORWARD}::test_given_map",),
    ),
    Fault(
        "states of another group of heads", COMPLEMENT,
        "const int64_t first = static_cast<int64_t>(p.bh_begin + local_bh)",
        "const int64_t first = static_cast<int64_t>(local_bh)",
        (f"{FORWARD}::test_states_in_groups_of_heads",),
    ),
    Fault(
        "phi of tokens past the end", STATE,
        "feature_map<kLanesPerRow>(x, r < tokens);", "feature_map<kLanesPerRow>(x, true);",
    ),
    Fault(
        "phi_input ignored", STATE,
        "if (p.phi_raw_k) unpack8<Element>(key_bits[i], x);", "",
        (f"{FORWARD}::test_options",),
    ),
    Fault(
        "phi_input ignored, Hopper", KEYS_SM90,
        "if (args.p.phi_raw_k) {", "if (false) {",
        (f"{FORWARD}::test_options",),
    ),
    Fault(
        "states not rounded to e4m3", STATE,
        "round_state(acc[m][n], scale, inverse);", "(void)scale, (void)inverse;",
        (f"{FORWARD}::test_states_in_e4m3",),
    ),
    Fault(
        "alpha of the block for every token", OUTPUT,
        "logits[p.alpha_per_token ? row : block]", "logits[block]",
        (f"{FORWARD}::test_given_map",),
    ),
    Fault(
        "short block not masked, Hopper", ATTENTION_SM90,
        "if (valid < kBlockK) {", "if (valid < 0) {",
    ),
    Fault(
        "scale of another slot of the ring, Hopper", ATTENTION_SM90,
        "(smem + C::kScales)[slot]", "(smem + C::kScales)[0]",
    ),
    Fault(
        "values of a block's first half for both, Hopper", ATTENTION_SM90,
        "issue_values<C>(acc[0], weights, value_tile(kSlot), 1);",
        "issue_values<C>(acc[0], weights, value_tile(kSlot), 0);",
    ),
    Fault(
        "high part of Z counted twice, Hopper", INPUTS_SM90,
        "P::from_floats(sum.x - first.x, sum.y - first.y)", "high.x",
    ),
    Fault(
        "second half of a warp's rows staged over the first, Hopper", STORE_SM90,
        "row = C::tile_row(0) + lane % 16;", "row = C::tile_row(0) + lane % 8;",
    ),
    Fault(
        "features of H in another order", LAYOUT,
        "f / 4 % 2 * 16 + f / 2 % 2 * 8", "f / 4 % 2 * 8 + f / 2 % 2 * 16",
    ),
    Fault(
        "listed blocks left in the complement, Hopper", ROUTE_SM90,
        "atomicAnd(&bits[column / 32 * kRows + row], ~(1u << mask_bit(column)));", "",
    ),
    Fault(
        "ties to the highest index, Hopper", SELECT_SM90,
        "__popc(equal & lanes_below) < equal_left", "__popc(equal & ~lanes_below) <= equal_left",
        (f"{FORWARD}::test_ties_go_to_the_lowest_index",),
    ),
    Fault(
        "low part of the router's rows lost", SPLIT_SM90,
        "Pair<__half>::from_floats(x0 - high.x, x1 - high.y);",
        "Pair<__half>::from_floats(0.f, 0.f);",
        (f"{FORWARD}::test_router_scores",),
    ),
    Fault(
        "key blocks of a product in another order, Hopper", LINEAR_SM90,
        "__byte_perm(pairs[i], pairs[i + 2], 0x6240)",
        "__byte_perm(pairs[i], pairs[i + 2], 0x6420)",
        (f"{FORWARD}::test_states_in_e4m3",),
    ),
    Fault(
        "columns of e4m3 states in another order, Hopper", STATE_SM90,
        "lane / 8 * 4 + lane / 4 % 2;", "lane / 16 * 4 + lane / 4 % 2;",
        (f"{FORWARD}::test_states_in_e4m3",),
    ),
    Fault(
        "gradient's phi(Q) Z not bounded, Hopper",
        f"{KERNELS}/sm90/bwd_rows_linear.cuh",
        "max_nan(lane_sum<4>(denominator[half]), kMinDenominator)",
        "max_nan(lane_sum<4>(denominator[half]), 1.17549435e-38f)",
        (f"{VALUES}::test_gradient_of_one_hot_features", f"{VALUES}::test_gradient_of_large_keys"),
    ),
    Fault(
        "e4m3 products sum all key blocks, Hopper", LINEAR_SM90,
        "constexpr int kSumRounds = 2;", "constexpr int kSumRounds = 1 << 20;",
        (f"{PATHS}::test_sums_over_many_key_blocks",),
    ),
    Fault(
        "kept sums of e4m3 products counted twice, Hopper", LINEAR_SM90,
        "x -= moved.x;", "",
        (f"{PATHS}::test_sums_over_many_key_blocks",),
    ),
    Fault(
        "short block not masked, none, Hopper", ATTENTION_ROWS_SM90,
        "valid = kLast ? p.shape.seqlen - smem.key[stage] : kBlockK;", "valid = kBlockK;",
    ),
    Fault(
        "a key block passed twice, Hopper", ROW_TILES_SM90,
        "next = list[done + 1];", "next = list[done];",
    ),
    Fault(
        "mask bits of the next columns, Hopper", BF16_SM90,
        "int rotation = 2 - lane % 4;", "int rotation = 1 - lane % 4;",
        (f"{FORWARD}::test_given_map",),
    ),
    Fault(
        "rows of a tile's two blocks exchanged, Hopper", BF16_SM90,
        "first_row + lane_row<kBlocks>() + 2 * m", "first_row + lane_row<kBlocks>() - 2 * m + 2",
        (f"{FORWARD}::test_given_map",),
    ),
    Fault(
        "rows of dh in another order, Hopper", BF16_SM90,
        "const int row = 2 * (lane % 8) + lane / 8 % 2;", "const int row = lane % 16;",
        (f"{BACKWARD}::test_lengths",),
    ),
    Fault(
        "a kernel on the legacy stream", COMPLEMENT,
        "<<<grid, kMaskThreads, bytes, p.stream>>>", "<<<grid, kMaskThreads, bytes, 0>>>",
        (
            f"{RUNTIME}::test_every_kernel_is_on_the_current_stream",
            f"{RUNTIME}::test_side_stream_waits_for_its_producer",
            f"{RUNTIME}::test_graph_replays_with_other_inputs",
        ),
    ),
    Fault(
        "scale missing in dQ", BWD_ROWS,
        "[&](int, int) { return p.softmax_scale; }", "[](int, int) { return 1.f; }",
        (f"{BACKWARD}::test_lengths",),
    ),
    Fault(
        "tail mask of dQ dropped", BWD_ROWS,
        "if (valid < C::kStepKeys) mask_columns(s, valid);", "",
        (f"{BACKWARD}::test_lengths",),
    ),
    Fault(
        "mean of K left in dQ", BWD_ROWS,
        "dq[m][n][i] -= row_sums[m][i / 2 * 2] * (i % 2 == 0 ? x.x : x.y);", "(void)x;",
        (f"{BACKWARD}::test_after_a_low_bit_forward_pass",),
    ),
    Fault(
        "gradient of a full row's states not zeroed", BWD_ROWS,
        "reinterpret_cast<uint4*>(dstate)[i] = make_uint4(0, 0, 0, 0);", "",
        (f"{BACKWARD}::test_poisoned_buffers",),
    ),
    Fault(
        "barrier before the next dO skipped", BWD_COLUMNS,
        "__syncthreads();  // Q may be overwritten", "",
        (
            f"{BACKWARD}::test_lengths", f"{BACKWARD}::test_a_column_in_parts",
            f"{RUNTIME}::test_gradients_are_the_same_bits_250_times",
        ),
        RACES,
    ),
    Fault(
        "last part of a column lost", BWD_COLUMNS,
        "for (int i = 0; i < parts; ++i) {", "for (int i = 0; i < parts - 1; ++i) {",
        (f"{BACKWARD}::test_a_column_in_parts",),
    ),
    Fault(
        "dV = for dV +=", BWD_COLUMNS,
        "add_value_gradient<C>(dv, p_tile, dh_tile);",
        "for_each_vector<C>([&](int m, int n, int) { dv[m][n][0] = 0.f; });\n"
        "    add_value_gradient<C>(dv, p_tile, dh_tile);",
        (f"{BACKWARD}::test_lengths",),
    ),
    Fault(
        "scale missing in dQ, Hopper", BWD_ROWS_SM90,
        "[&](int, int, int) { return p.softmax_scale; }", "[](int, int, int) { return 1.f; }",
        (f"{BACKWARD}::test_lengths",),
    ),
    Fault(
        "tail mask of dQ dropped, Hopper", BWD_ROWS_SM90,
        "score_gradients<C, true>(", "score_gradients<C, false>(",
        (f"{BACKWARD}::test_lengths",),
    ),
    Fault(
        "mean of K left in dQ, Hopper", BWD_ROWS_SM90,
        "dq[n][i] -= row_sums[i / 2] * (i % 2 == 0 ? x.x : x.y);", "(void)x;",
        (f"{BACKWARD}::test_after_a_low_bit_forward_pass",),
    ),
    Fault(
        "last part of a column lost, Hopper", BWD_COLUMNS_SM90,
        "for (int j = 0; j < parts; ++j) {", "for (int j = 0; j < parts - 1; ++j) {",
        (f"{BACKWARD}::test_a_column_in_parts",),
    ),
    Fault(
        "statistics of another step of the ring, Hopper", BWD_COLUMNS_SM90,
        "weigh<C>(s, smem.shift[ring.stage],", "weigh<C>(s, smem.shift[0],",
        (f"{BACKWARD}::test_lengths",),
    ),
    Fault(
        "keys past the end in dK's mean", BWD_KEYS,
        "if (place.row(m, 2 * half) >= valid) continue;", "",
        (f"{BACKWARD}::test_lengths",),
    ),
    Fault(
        "gradient of alpha not summed over the batch", BWD_FINISH,
        "bh += shared ? 1 : p.shape.num_heads", "bh += p.shape.num_bh",
        (f"{BACKWARD}::test_options",),
    ),
    Fault(
        "log m missing in the forward pass", ATTENTION,
        "kSoft ? log2_approx(fabsf(factor)) : shift", "shift",
        (f"{SOFT}::test_lengths",),
    ),
    Fault(
        "log m missing in dQ", BWD_ROWS,
        "shift -= log2_weight;", ";",
        (f"{SOFT}::test_lengths",),
    ),
    Fault(
        "sums of dS over half a block", BWD_ROWS,
        "block_sum += x + y;", "block_sum += x;",
        (f"{SOFT}::test_the_gradient_of_log_m",),
    ),
    Fault(
        "linear share of the gradient of log m missing", SOFT_PRODUCTS,
        "fmaf(-weight, acc[m][n][i], sparse)", "sparse",
        (f"{SOFT}::test_the_gradient_of_log_m",),
    ),
    Fault(
        "no step of the search in float64", SOFT_TOP_K,
        "shift = find_shift<double>(row, guess, 0x1p-46, 0x1p-16);", "shift = guess;",
        (f"{SOFT_MAP}::test_lengths",),
    ),
    Fault(
        "pinned blocks in the mean of their row's gradient", SOFT_TOP_K,
        "sums.y += rest * p.grad_log_map[first + j];", "sums.y += p.grad_log_map[first + j];",
        (f"{SOFT_MAP}::test_gradient",),
    ),
    Fault(
        "a block at the threshold left out", LAYOUT,
        "return !(m < SLA2_SOFT_MAP_MIN);", "return m > SLA2_SOFT_MAP_MIN;",
        (f"{SOFT}::test_the_threshold",),
    ),
)  # fmt: skip
