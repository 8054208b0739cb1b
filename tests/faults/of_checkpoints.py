"""Faults 1 to 14: checkpoints and the run's folder."""

from __future__ import annotations

from tests.faults.defences import Defence, Fault, Patch

RESUME = "tests/engine/test_resume.py"
RUNS = "tests/engine/test_faults_and_runs.py"
SAVING = "tests/engine/test_saving.py"
SAVED = "tests/faults/test_saved.py"
KILLED = f"{RESUME}::test_killed_and_started_again"
FLIPPED = f"{SAVED}::test_one_flipped_bit_in_any_file"
CHECKPOINT = "longskip/engine/checkpoint.py"

# What lies in a step's folder counts before all of it is there: no name of its own until then, and nothing looks.
IN_PLACE = (
    Patch(CHECKPOINT, 'self.checkpoints / f"step-{self.step:08d}.tmp"', 'self.checkpoints / f"step-{self.step:08d}"'),
    Patch(CHECKPOINT, "        disk.remove(self.final)  # of this step, from before a rollback\n", ""),
)
UNVERIFIED = Patch(
    CHECKPOINT,
    "        try:\n            verify(folder)\n        except CheckpointError as error:\n            complaints.append",
    "        try:\n            pass\n        except CheckpointError as error:\n            complaints.append",
)
MANIFEST_AFTER_THE_RENAME = (
    Patch(
        CHECKPOINT,
        '        disk.write_text(temporary / "manifest.json", json.dumps(manifest, indent=1))\n        disk.sync(temporary)\n',
        "",
    ),
    Patch(
        CHECKPOINT,
        "        with contextlib.suppress(OSError):  # it is committed, whatever becomes of these",
        '        disk.write_text(self.final / "manifest.json", json.dumps(manifest, indent=1))\n'
        "        with contextlib.suppress(OSError):  # it is committed, whatever becomes of these",
    ),
)

CHECKPOINT_FAULTS = (
    Fault(
        1,
        "SIGKILL of rank 1 half-way through its shard",
        "resumes from the newest complete step; the end is bitwise that of the unbroken run",
        (f"{KILLED}[save.shard_half:kill:rank=1:step=6]",),
        (
            Defence(
                "a step's folder has another name until it is whole, and is verified before it is taken",
                (f"{KILLED}[save.shard_half:kill:rank=1:step=6]",),
                (*IN_PLACE, UNVERIFIED),
            ),
        ),
    ),
    Fault(
        2,
        "SIGKILL of rank 0 after all shards, before the manifest",
        "resumes from the newest complete step; the end is bitwise that of the unbroken run",
        (f"{KILLED}[save.before_manifest:kill:rank=0:step=6]", f"{KILLED}[save.shard_written:kill:rank=0:step=6]"),
        (
            Defence(
                "a step's folder has another name until it is whole, and is verified before it is taken",
                (f"{KILLED}[save.before_manifest:kill:rank=0:step=6]",),
                (*IN_PLACE, UNVERIFIED),
            ),
        ),
    ),
    Fault(
        3,
        "SIGKILL round the rename",
        "between manifest and rename, and between rename and the parent's fsync: old or new, never a mix",
        (
            f"{KILLED}[save.before_rename:kill:rank=0:step=6]",
            f"{KILLED}[save.before_latest:kill:rank=0:step=6]",
            f"{SAVING}::test_killed_before_every_write_fsync_and_rename_in_turn[1-0]",
            f"{SAVING}::test_all_is_on_the_disk_before_it_is_seen",
        ),
        (
            Defence(
                "the manifest is written before the rename",
                (f"{SAVING}::test_killed_before_every_write_fsync_and_rename_in_turn[1-0]",),
                MANIFEST_AFTER_THE_RENAME,
            ),
        ),
    ),
    Fault(
        4,
        "SIGKILL at every write, fsync and rename of a save in turn",
        "the newest complete step is the old one or the new one, bit for bit what it was",
        (
            f"{SAVING}::test_killed_before_every_write_fsync_and_rename_in_turn",
            f"{SAVING}::test_these_are_all_operations",
            *(
                f"{SAVING}::test_killed_while_it_writes_and_started_again[2-save.io:kill:rank={place}]"
                for place in ("0:step=6:nth=2", "0:step=6:nth=9", "0:step=6:nth=16", "1:step=6:nth=3", "1:step=6:nth=6")
            ),
        ),
        (
            Defence(
                "an old step is renamed before it is removed",
                (f"{SAVING}::test_killed_before_every_write_fsync_and_rename_in_turn[1-0]",),
                (
                    Patch(
                        "longskip/engine/durable.py",
                        "            self.rename(folder, doomed)\n            self._next()\n",
                        '            (folder / "manifest.json").unlink()\n'
                        "            self._next()\n            self.rename(folder, doomed)\n",
                    ),
                ),
            ),
            Defence(
                "what an interrupted save left is removed before the next one",
                (f"{SAVING}::test_killed_before_every_write_fsync_and_rename_in_turn[1-0]",),
                (
                    Patch(
                        CHECKPOINT,
                        "            shutil.rmtree(self.temporary, ignore_errors=True)\n"
                        "            self.temporary.mkdir(parents=True)\n",
                        "            self.temporary.mkdir(parents=True, exist_ok=True)\n",
                    ),
                    Patch(
                        CHECKPOINT, "            shutil.rmtree(leftover, ignore_errors=True)\n", "            pass\n"
                    ),
                ),
            ),
        ),
    ),
    Fault(
        5,
        "rank 1 slow",
        "nothing final is visible before it is done",
        (
            f"{SAVED}::test_nothing_final_is_visible_before_a_slow_rank_is_done",
            f"{SAVING}::test_a_slow_rank_holds_nobody_until_the_next_save",
        ),
        (
            Defence(
                "a step's folder has another name until every rank is done",
                (f"{SAVED}::test_nothing_final_is_visible_before_a_slow_rank_is_done",),
                IN_PLACE,
            ),
        ),
    ),
    Fault(
        6,
        "disk full",
        "one clear error with path, needed and free bytes; training goes on; the earlier step is intact",
        (
            f"{RUNS}::test_a_disk_that_is_really_full",
            f"{RUNS}::test_records_that_cannot_be_written_are_complained_of_and_tolerated",
            f"{RESUME}::test_a_full_disk_leaves_the_earlier_checkpoint_and_training_goes_on",
            f"{SAVING}::test_a_full_disk_at_every_write_is_heard_of_by_all",
        ),
        (
            Defence(
                "free space is looked at before anything is written",
                (f"{RUNS}::test_a_disk_that_is_really_full",),
                (Patch(CHECKPOINT, "    if free >= needed * 1.02 + (1 << 20):\n", "    if True:\n"),),
            ),
            Defence(
                "a rank's failure to write is told to all",
                (f"{RESUME}::test_a_full_disk_leaves_the_earlier_checkpoint_and_training_goes_on",),
                (
                    Patch(
                        CHECKPOINT,
                        "    except (OSError, CheckpointError) as error:\n",
                        "    except CheckpointError as error:\n",
                    ),
                    Patch(
                        "longskip/engine/saving.py",
                        "    except Exception as error:  # of any kind",
                        "    except CheckpointError as error:  # of any kind",
                    ),
                ),
            ),
        ),
    ),
    Fault(
        7,
        "one flipped bit in each file of the newest step",
        "named, marked .bad, the step before used",
        (
            FLIPPED,
            f"{SAVED}::test_no_bit_of_the_manifest_can_flip_unnoticed",
            f"{RESUME}::test_a_damaged_checkpoint_is_passed_over",
        ),
        (
            Defence(
                "files are hashed before they are read",
                (f"{FLIPPED}[weights-00000.safetensors]",),
                (Patch(CHECKPOINT, '        if file_sha256(path) != expected["sha256"]:\n', "        if False:\n"),),
            ),
            Defence(
                "the manifest names its own hash",
                (f"{SAVED}::test_no_bit_of_the_manifest_can_flip_unnoticed",),
                (
                    Patch(
                        CHECKPOINT,
                        '    if manifest.get("sha256", own := _own_sha256(manifest)) != own:',
                        "    if False:",
                    ),
                ),
            ),
        ),
    ),
    Fault(
        8,
        "truncated, empty, missing, extra file",
        "named, marked .bad, the step before used",
        (
            f"{SAVED}::test_a_file_that_is_not_whole",
            f"{SAVED}::test_a_file_too_many",
            f"{SAVED}::test_after_damage_the_same_command_ends_where_the_unbroken_run_ends",
            f"{RESUME}::test_pruning_never_takes_the_only_good_checkpoint",
        ),
        (
            Defence(
                "files are looked for",
                (f"{SAVED}::test_a_file_that_is_not_whole",),
                (
                    Patch(
                        CHECKPOINT,
                        "        if path.is_symlink() or not path.is_file():\n            raise",
                        "        if not path.is_file():\n            continue\n        if False:\n            raise",
                    ),
                ),
            ),
            Defence(
                "files that the manifest does not know are strangers",
                (f"{SAVED}::test_a_file_too_many",),
                (Patch(CHECKPOINT, "        if strangers:\n", "        if False:\n"),),
            ),
            Defence(
                "a bad step is marked, so that it is not met again",
                (f"{SAVED}::test_after_damage_the_same_command_ends_where_the_unbroken_run_ends[extra]",),
                (Patch(CHECKPOINT, "            if mark_bad:\n                _mark_bad(folder)\n", ""),),
            ),
        ),
    ),
    Fault(
        9,
        "manifest with bad JSON, .., an absolute path, another version",
        "refused; nothing outside the folder is read",
        (
            f"{RUNS}::test_hostile_manifests_are_refused",
            "tests/trust/test_fuzz_manifest.py::test_manifests_with_odd_values",
        ),
        (
            Defence(
                "names are those of files of this folder",
                (f"{RUNS}::test_hostile_manifests_are_refused",),
                (Patch(CHECKPOINT, "        if not _NAME.match(name):\n", "        if False:\n"),),
            ),
            Defence(
                "the version is compared",
                (f"{RUNS}::test_hostile_manifests_are_refused",),
                (Patch(CHECKPOINT, '    if manifest.get("version") != VERSION:\n', "    if False:\n"),),
            ),
        ),
    ),
    Fault(
        10,
        "resume at the same number of ranks",
        "bitwise: losses, parameters, optimizer, EMA, counters, data cursor, in fp32 and bf16, at every stage",
        (f"{KILLED}[step.backward:kill:rank=1:step=5]", f"{RESUME}::test_killed_in_bf16_at_every_stage"),
        (
            Defence(
                "Adam's second moment is read back",
                (f"{KILLED}[step.backward:kill:rank=1:step=5]",),
                (
                    Patch(
                        CHECKPOINT,
                        "            for kind in KINDS:\n                target",
                        '            for kind in [k for k in KINDS if k != "exp_avg_sq"]:\n                target',
                    ),
                ),
            ),
            Defence(
                "the EMA is read back",
                (f"{KILLED}[step.backward:kill:rank=1:step=5]",),
                (
                    Patch(
                        CHECKPOINT,
                        "            for kind in KINDS:\n                target",
                        '            for kind in [k for k in KINDS if k != "ema"]:\n                target',
                    ),
                ),
            ),
            Defence(
                "the data cursor is read back",
                (f"{KILLED}[step.backward:kill:rank=1:step=5]",),
                (
                    Patch(
                        "longskip/engine/prepare.py",
                        "        cursor=state.cursor,\n",
                        "        cursor=plan.cursor(),\n",
                    ),
                ),
            ),
        ),
    ),
    Fault(
        11,
        "resume 2→1, 2→4, 1→2 ranks",
        "the same global sample order by id, losses within 1e-6 relative",
        (
            f"{SAVED}::test_other_numbers_of_ranks_read_the_same_samples",
            f"{RESUME}::test_another_number_of_ranks_goes_on",
            "tests/engine/test_elastic.py::test_two_one_four_two_ranks_with_other_stages_and_layouts",
        ),
        (
            Defence(
                "the micro-batch is kept and accumulation follows",
                (f"{SAVED}::test_other_numbers_of_ranks_read_the_same_samples[2-1]",),
                (
                    Patch(
                        "longskip/engine/prepare.py",
                        "        accumulation=batch.accumulation,\n",
                        "        accumulation=1,\n",
                    ),
                ),
            ),
        ),
    ),
    Fault(
        12,
        "another configuration at a resume",
        "refused with the differing keys; a list of harmless ones may change",
        (
            f"{RUNS}::test_another_configuration_is_refused_with_the_differing_keys",
            "tests/engine/test_config.py::test_round_trip_and_what_may_change_on_resume",
            f"{RESUME}::test_other_data_in_the_same_place_is_refused",
        ),
        (
            Defence(
                "configurations are compared",
                (f"{RUNS}::test_another_configuration_is_refused_with_the_differing_keys",),
                (Patch("longskip/engine/runs.py", "        if differing:\n", "        if False:\n"),),
            ),
            Defence(
                "data are known by their fingerprint",
                (f"{RESUME}::test_other_data_in_the_same_place_is_refused",),
                (
                    Patch(
                        "longskip/engine/runs.py",
                        '        if saved.get("fingerprint") != data["fingerprint"]:\n',
                        "        if False:\n",
                    ),
                ),
            ),
        ),
    ),
    Fault(
        13,
        "hostile pickle in a shard file, in the state or in the pointer",
        "refused before anything is unpickled",
        (
            f"{SAVED}::test_a_pickle_under_a_matching_manifest_is_not_unpickled",
            "tests/trust/test_fuzz_manifest.py::test_a_pickle_is_known_by_its_first_bytes",
            "tests/test_house.py::test_no_pickle_and_no_shell",
        ),
        (
            Defence(
                "state is JSON and nothing else",
                (f"{SAVED}::test_a_pickle_under_a_matching_manifest_is_not_unpickled[state.json]",),
                (
                    Patch(
                        CHECKPOINT,
                        "def read_state(folder: Path) -> dict[str, Any]:\n",
                        "def read_state(folder: Path) -> dict[str, Any]:\n"
                        "    import pickle\n\n"
                        '    if (folder / "state.json").read_bytes()[:1] != b"{":\n'
                        '        return pickle.loads((folder / "state.json").read_bytes())\n',
                    ),
                ),
            ),
            Defence(
                "tensors are safetensors and nothing else",
                (f"{SAVED}::test_a_pickle_under_a_matching_manifest_is_not_unpickled[weights-00001.safetensors]",),
                (
                    Patch(
                        CHECKPOINT,
                        "class Archive:\n",
                        "def _unpickled(path: Path) -> None:\n"
                        "    import pickle\n\n"
                        '    if path.read_bytes()[:1] == b"\\x80":\n'
                        "        pickle.loads(path.read_bytes())\n\n\n"
                        "class Archive:\n",
                    ),
                    Patch(
                        CHECKPOINT,
                        "            path = folder / name\n",
                        "            path = folder / name\n            _unpickled(path)\n",
                    ),
                ),
            ),
        ),
    ),
    Fault(
        14,
        "two jobs on one run folder",
        "the second stops at once and names the owner",
        ("tests/launcher/test_cli.py::test_two_jobs_in_one_folder",),
        (
            Defence(
                "the run's folder is locked",
                ("tests/launcher/test_cli.py::test_two_jobs_in_one_folder",),
                (
                    Patch(
                        "longskip/engine/runs.py",
                        "            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)\n",
                        "            pass\n",
                    ),
                ),
            ),
        ),
    ),
)
