"""Faults 25 to 30: data and numbers."""

from __future__ import annotations

from tests.faults.defences import Defence, Fault, Patch

INDEX = "tests/engine/test_index.py"
DECODE = "tests/engine/test_decode.py"
DATA = "tests/faults/test_data_at_fault.py"
WRONG = "tests/faults/test_wrong_configurations.py"
AGREEMENT = "tests/engine/test_agreement.py"
NUMBERS = "tests/engine/test_numbers.py"

DATA_FAULTS = (
    Fault(
        25,
        "damaged shards",
        "cut at a member's border, in a header, in data, emptied, or with a flipped byte: found by size, hash or count; "
        "stop, or skip and count; all ranks agree",
        (
            f"{INDEX}::test_truncated_shards_are_named_with_sizes_and_cure",
            f"{INDEX}::test_a_flipped_header_byte_is_found_by_indexing_wherever_it_is",
            f"{INDEX}::test_a_flipped_header_byte_before_a_probed_member_is_found_on_opening",
            f"{INDEX}::test_a_flipped_data_byte_stops_or_makes_a_bad_sample_as_configured",
            f"{INDEX}::test_empty_tars_are_refused",
            f"{INDEX}::test_zeroed_and_appended_archives_are_refused",
            f"{AGREEMENT}::test_a_shard_that_one_rank_cannot_read",
            f"{DATA}::test_damage_is_skipped_and_counted_alike_on_any_number_of_ranks",
            f"{DATA}::test_a_truncated_shard_is_refused_by_all_ranks_before_the_first_step",
        ),
        (
            Defence(
                "a shard's size is compared with the index",
                (f"{DATA}::test_a_truncated_shard_is_refused_by_all_ranks_before_the_first_step",),
                (Patch("longskip/engine/data/index.py", "    if size != shard.bytes:\n", "    if False:\n"),),
            ),
            Defence(
                "a walk through a tar counts only where it reaches the end of the archive",
                (f"{INDEX}::test_a_flipped_header_byte_is_found_by_indexing_wherever_it_is",),
                (
                    Patch(
                        "longskip/engine/data/index.py",
                        "        if size - end < _END or any(data[end : end + _END]):\n",
                        "        if False:\n",
                    ),
                    Patch(
                        "longskip/engine/data/index.py", '        if data[end:].strip(b"\\0"):\n', "        if False:\n"
                    ),
                ),
            ),
            Defence(
                "a member's bytes are compared with their crc32",
                (f"{DATA}::test_damage_is_skipped_and_counted_alike_on_any_number_of_ranks",),
                (
                    Patch(
                        "longskip/engine/data/sources.py",
                        '            if len(data) == size and crc32(data) == row[f"{kind}_crc32"]:\n',
                        "            if len(data) == size:\n",
                    ),
                ),
            ),
            Defence(
                "ranks agree before a step on whether all could read",
                (f"{AGREEMENT}::test_a_shard_that_one_rank_cannot_read[3]",),
                (
                    Patch(
                        "longskip/engine/job.py",
                        '            agree(failure, f"read its samples of step {self.state.step + 1}", self.world.device)\n',
                        "            if failure is not None:\n                raise failure\n",
                    ),
                ),
            ),
        ),
    ),
    Fault(
        26,
        "broken pictures and captions",
        "skipped with a counter per reason, memory bounded, the run stopped above the share; odd but sound ones are read",
        (
            f"{DECODE}::test_modes_become_rgb",
            f"{DECODE}::test_of_an_animation_the_first_frame_is_taken",
            f"{DECODE}::test_a_bomb_is_refused_before_it_is_decoded",
            f"{DECODE}::test_broken_bytes_have_reasons",
            f"{DATA}::test_broken_samples_are_skipped_with_their_reasons",
            f"{DATA}::test_too_many_broken_samples_stop_both_ranks_at_the_same_step",
        ),
        (
            Defence(
                "pixels are counted by the header, before anything is decoded",
                (f"{DATA}::test_broken_samples_are_skipped_with_their_reasons",),
                (
                    Patch(
                        "longskip/engine/data/decode.py",
                        "        if image.width * image.height > max_pixels:\n",
                        "        if False:\n",
                    ),
                ),
            ),
            Defence(
                "the share of bad samples is bounded",
                (f"{DATA}::test_too_many_broken_samples_stop_both_ranks_at_the_same_step",),
                (
                    Patch(
                        "longskip/engine/job.py",
                        "        if self.state.bad_samples > self.config.data.max_bad_share * max(seen, 100):\n",
                        "        if False:\n",
                    ),
                ),
            ),
            Defence(
                "a text's bytes are bounded",
                (f"{DATA}::test_broken_samples_are_skipped_with_their_reasons",),
                (
                    Patch(
                        "longskip/engine/data/captions.py",
                        "        if data is not None and len(data) > MAX_TEXT_BYTES:\n",
                        "        if False:\n",
                    ),
                    Patch("longskip/engine/data/sources.py", "        if size > limit:\n", "        if False:\n"),
                ),
            ),
        ),
    ),
    Fault(
        27,
        "members that could run code, pipes, paths, links, twins",
        "none is executed or opened",
        (
            f"{INDEX}::test_hostile_members_are_refused",
            f"{INDEX}::test_links_and_devices_are_refused",
            f"{INDEX}::test_duplicates_are_refused",
            f"{INDEX}::test_a_pickled_table_is_not_unpickled",
            f"{INDEX}::test_urls_are_refused",
            "tests/engine/test_pack.py::test_hostile_samples_are_refused_and_leave_nothing",
        ),
        (
            Defence(
                "members whose extension is of a pickle or a module are refused",
                (f"{INDEX}::test_hostile_members_are_refused[a.pkl]",),
                (
                    Patch(
                        "longskip/engine/data/index.py",
                        '            if REFUSED.intersection(extension.split(".")):\n',
                        "            if False:\n",
                    ),
                ),
            ),
            Defence(
                "keys cannot leave the folder",
                (f"{INDEX}::test_hostile_members_are_refused[../a.txt]",),
                (
                    Patch(
                        "longskip/engine/data/index.py",
                        '    if not key or key.startswith("/") or ".." in parts or _UNSAFE.search(key):\n',
                        "    if not key:\n",
                    ),
                ),
            ),
            Defence(
                "links and devices are refused",
                (f"{INDEX}::test_links_and_devices_are_refused",),
                (
                    Patch(
                        "longskip/engine/data/index.py",
                        "            if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.sparse is not None:\n",
                        "            if False:\n",
                    ),
                ),
            ),
            Defence(
                "a key stands once",
                (f"{INDEX}::test_duplicates_are_refused",),
                (
                    Patch(
                        "longskip/engine/data/index.py",
                        "                if key in seen:\n",
                        "                if False:\n",
                    ),
                ),
            ),
            Defence(
                "what looks like a URL or a pipe is no file",
                (f"{INDEX}::test_urls_are_refused",),
                (Patch("longskip/engine/data/index.py", "    if _URL.search(text):\n", "    if False:\n"),),
            ),
        ),
    ),
    Fault(
        28,
        "NaN or infinity on one rank",
        "the step moves nothing on any rank, at every stage; sample ids are listed; three in a row stop the run",
        (
            f"{NUMBERS}::test_a_skipped_step_is_a_step_that_was_not_taken",
            f"{NUMBERS}::test_at_every_stage",
            f"{NUMBERS}::test_skipped_steps_are_told",
            f"{NUMBERS}::test_three_in_a_row_stop_all_ranks",
            f"{NUMBERS}::test_killed_behind_a_skipped_step",
            "tests/engine/test_faults_and_runs.py::test_a_loss_that_is_not_finite_stops_all_ranks_before_the_step",
            "tests/engine/test_faults_and_runs.py::test_a_gradient_that_is_not_finite_moves_no_weight",
        ),
        (
            Defence(
                "the optimizer is held still",
                (f"{NUMBERS}::test_a_skipped_step_is_a_step_that_was_not_taken",),
                (Patch("longskip/engine/numbers.py", "    optimizer.set_step(0, 0.0, 0.0)\n", "    pass\n"),),
            ),
            Defence(
                "three in a row are one too many",
                (f"{NUMBERS}::test_three_in_a_row_stop_all_ranks",),
                (
                    Patch(
                        "longskip/engine/job.py",
                        'group.not_finite == "stop" or in_a_row >= group.not_finite_limit',
                        'group.not_finite == "stop"',
                    ),
                ),
            ),
            Defence(
                "samples of a skipped step are listed",
                (f"{NUMBERS}::test_skipped_steps_are_told",),
                (
                    Patch(
                        "longskip/engine/job.py",
                        "        samples, keys = _samples_of(micro_batches)\n        self.incident",
                        "        samples, keys = _samples_of(micro_batches[:0])\n        self.incident",
                    ),
                ),
            ),
        ),
    ),
    Fault(
        29,
        "few shards, dry ranks, dead workers",
        "the same number of steps everywhere, no hang, a clear error",
        (
            f"{DATA}::test_fewer_shards_than_ranks_times_workers",
            f"{DATA}::test_after_a_dead_worker_the_same_command_ends_where_the_unbroken_run_ends",
            f"{AGREEMENT}::test_a_data_worker_that_dies",
            "tests/engine/test_reader.py::test_a_killed_worker_is_an_error_and_not_a_hang",
        ),
        (
            Defence(
                "ranks agree before a step on whether all could read",
                (f"{AGREEMENT}::test_a_data_worker_that_dies",),
                (
                    Patch(
                        "longskip/engine/job.py",
                        '            agree(failure, f"read its samples of step {self.state.step + 1}", self.world.device)\n',
                        "            if failure is not None:\n                raise failure\n",
                    ),
                ),
            ),
            Defence(
                "a rank's slots are dealt out by the plan, not by shards",
                (f"{DATA}::test_fewer_shards_than_ranks_times_workers[full]",),
                (
                    Patch(
                        "longskip/engine/prepare.py",
                        "        rank=world.rank,\n        world=world.size,\n",
                        "        rank=0,\n        world=world.size,\n",
                    ),
                ),
            ),
        ),
    ),
    Fault(
        30,
        "wrong configurations",
        "refused before any process group exists, with the key and what is allowed, in under 2 s; numbers that YAML reads "
        "as text are numbers",
        (
            f"{WRONG}::test_refused_before_any_process_group",
            f"{WRONG}::test_a_number_that_yaml_reads_as_text_is_the_number",
            "tests/engine/test_config.py::test_refusals",
            "tests/engine/test_config.py::test_batches_divide_or_say_which_worlds_do",
        ),
        (
            Defence(
                "keys that no group has are refused",
                (f"{WRONG}::test_refused_before_any_process_group[unknown key]",),
                (Patch("longskip/engine/fields.py", 'extra="forbid"', 'extra="ignore"'),),
            ),
            Defence(
                "a key stands once",
                (f"{WRONG}::test_refused_before_any_process_group[duplicate key]",),
                (Patch("longskip/profiling/yamlfiles.py", "            if key in seen:\n", "            if False:\n"),),
            ),
            Defence(
                "aliases are refused",
                (f"{WRONG}::test_refused_before_any_process_group[alias bomb]",),
                (
                    Patch(
                        "longskip/profiling/yamlfiles.py",
                        "        if isinstance(event, yaml.AliasEvent):\n",
                        "        if False:\n",
                    ),
                ),
            ),
            Defence(
                "YAML is loaded by a loader without Python's tags",
                (f"{WRONG}::test_refused_before_any_process_group[python tag]",),
                (
                    Patch(
                        "longskip/profiling/yamlfiles.py",
                        "class _Loader(yaml.SafeLoader):",
                        "class _Loader(yaml.UnsafeLoader):",
                    ),
                ),
            ),
            Defence(
                "numbers are finite",
                (f"{WRONG}::test_refused_before_any_process_group[infinite]",),
                (
                    Patch(
                        "longskip/engine/fields.py",
                        "Rate = Annotated[float, BeforeValidator(_number), Field(ge=0.0, allow_inf_nan=False)]",
                        "Rate = Annotated[float, BeforeValidator(_number), Field(ge=0.0)]",
                    ),
                ),
            ),
            Defence(
                "the batch is divided before torch is loaded",
                (f"{WRONG}::test_refused_before_any_process_group[indivisible batch]",),
                (
                    Patch(
                        "longskip/launcher/cli.py",
                        '    if world.isdigit() and not (run / "run.json").is_file():\n',
                        "    if False:\n",
                    ),
                ),
            ),
        ),
    ),
)
