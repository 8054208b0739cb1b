"""Faults 15 to 24: processes, the network, and words from outside."""

from __future__ import annotations

from tests.faults.defences import Defence, Fault, Patch

SUPERVISOR = "tests/launcher/test_supervisor.py"
TRAINED = "tests/launcher/test_supervised_training.py"
NAMESPACES = "tests/launcher/test_namespaces.py"
DIGESTS = "tests/engine/test_digests.py"
WORDS = "tests/faults/test_words_from_outside.py"
CLOCKS = "tests/faults/test_clocks.py"
MEMBERS = "longskip/launcher/members.py"
PROCESSES = "longskip/launcher/processes.py"
GONE_SOON = f"{SUPERVISOR}::test_fault_15_all_ranks_and_what_they_started_are_gone_soon_and_come_up_again"
STOPPED = f"{SUPERVISOR}::test_fault_16_a_stopped_rank_is_found_its_stacks_dumped_and_killed"
REFUSED = f"{WORDS}::test_names_and_options_that_are_none_are_refused"

PROCESS_FAULTS = (
    Fault(
        15,
        "SIGKILL of a rank in a step",
        "all ranks gone within 5 s, rank and signal told, started again from the last commit; the end is bitwise the "
        "unbroken run's",
        (
            GONE_SOON,
            f"{TRAINED}::test_fault_15_sigkill_in_a_step",
            f"{SUPERVISOR}::test_a_killed_supervisor_leaves_no_rank",
        ),
        (
            Defence(
                "the supervisor starts the ranks again",
                (GONE_SOON,),
                (Patch(MEMBERS, "        if self._is_loop(committed):\n", "        if True:\n"),),
            ),
            Defence(
                "what a rank has started goes with it",
                (GONE_SOON,),
                (
                    Patch(
                        PROCESSES,
                        "        if self._ranks:\n            self._sweep(deadline)\n",
                        "",
                    ),
                    Patch(
                        PROCESSES,
                        "        with contextlib.suppress(ProcessLookupError, PermissionError):\n"
                        "            os.killpg(rank.process.pid, signal.SIGKILL)\n"
                        "        code = rank.process.wait()\n",
                        "        code = rank.process.wait()\n",
                    ),
                    Patch(
                        PROCESSES,
                        "            with contextlib.suppress(ProcessLookupError, PermissionError):\n"
                        "                os.killpg(rank.process.pid, signal.SIGKILL)\n        deadline",
                        "            rank.process.kill()\n        deadline",
                    ),
                ),
            ),
            Defence(
                "every attempt meets under a prefix of its own in the store",
                (f"{TRAINED}::test_fault_15_sigkill_in_a_step[1]",),
                (
                    Patch(
                        "longskip/engine/distributed.py",
                        "f\"attempt_{os.environ.get(ATTEMPT, '0')}\"",
                        '"attempt"',
                    ),
                ),
            ),
            Defence(
                "ranks die with their supervisor",
                (f"{SUPERVISOR}::test_a_killed_supervisor_leaves_no_rank",),
                (Patch("longskip/engine/signals.py", "    ctypes.CDLL(None).prctl(1, signal.SIGKILL)\n", ""),),
            ),
        ),
    ),
    Fault(
        16,
        "SIGSTOP of a rank",
        "found within the step time-out + 5 s, the stacks of all ranks dumped, the stopped one killed",
        (
            STOPPED,
            f"{TRAINED}::test_fault_16_sigstop_in_a_step",
            f"{SUPERVISOR}::test_a_rank_that_waits_for_ever_hangs_without_a_signal",
        ),
        (
            Defence(
                "ranks that stay too long in a step are looked for",
                (STOPPED,),
                (
                    Patch(
                        PROCESSES,
                        '        if not any(ending.kind == "hung" for ending in self.endings):\n',
                        "        if False:\n",
                    ),
                ),
            ),
            Defence(
                "stacks are dumped before the ranks are killed",
                (STOPPED,),
                (
                    Patch(
                        PROCESSES,
                        "        if dump:\n            stacks.dump(",
                        "        if False:\n            stacks.dump(",
                    ),
                ),
            ),
        ),
    ),
    Fault(
        17,
        "SIGTERM once and twice",
        "all ranks save at the next step's end, exit code 75, no child left; the second signal does not tear the save",
        (
            f"{SUPERVISOR}::test_fault_17_sigterm_once_and_twice",
            f"{TRAINED}::test_fault_17_a_signal_saves_and_the_same_command_goes_on",
            f"{TRAINED}::test_a_signal_before_the_first_step",
            "tests/engine/test_resume.py::test_a_signal_saves_and_the_same_command_goes_on",
        ),
        (
            Defence(
                "ranks remember a signal instead of ending",
                ("tests/engine/test_resume.py::test_a_signal_saves_and_the_same_command_goes_on",),
                (
                    Patch(
                        "longskip/engine/signals.py",
                        "    for number in ASKING:\n        signal.signal(number, _remember)\n",
                        "    for number in ASKING:\n        signal.signal(number, signal.SIG_DFL)\n",
                    ),
                ),
            ),
            Defence(
                "ranks agree on the step at which they stop",
                ("tests/engine/test_resume.py::test_a_signal_saves_and_the_same_command_goes_on",),
                (
                    Patch(
                        "longskip/engine/job.py",
                        '        self.stopping = told["stop"] > 0\n',
                        "        self.stopping = signals.asked()\n",
                    ),
                ),
            ),
            Defence(
                "the supervisor passes a signal on",
                (f"{SUPERVISOR}::test_fault_17_sigterm_once_and_twice",),
                (Patch(PROCESSES, "                rank.process.send_signal(number)\n", ""),),
            ),
        ),
    ),
    Fault(
        18,
        "the network is cut (two namespaces)",
        "both sides end within the time-out, one side at most commits",
        (f"{NAMESPACES}::test_fault_18_a_link_that_is_cut_ends_both_sides_with_one_commit",),
        (
            Defence(
                "a node that is silent is lost, on both sides",
                (f"{NAMESPACES}::test_fault_18_a_link_that_is_cut_ends_both_sides_with_one_commit",),
                (
                    Patch(
                        MEMBERS,
                        'report.state == "left" or silent >= self.terms.node_timeout',
                        'report.state == "left"',
                    ),
                    Patch(
                        "longskip/launcher/supervisor.py",
                        "        if word is None or self.exchange.age() > self.config.launch.node_timeout:\n",
                        "        if word is None:\n",
                    ),
                ),
            ),
        ),
    ),
    Fault(
        19,
        "ranks that differ",
        "the next comparison of digests stops all ranks and tells both digests; nothing of it is saved",
        (f"{DIGESTS}::test_one_flipped_bit_of_a_weight", f"{DIGESTS}::test_whatever_differs_is_named_and_not_saved"),
        (
            Defence(
                "digests are compared",
                (f"{DIGESTS}::test_one_flipped_bit_of_a_weight[0-1]",),
                (
                    Patch(
                        "longskip/engine/digests.py",
                        "    if found:\n        error = Desync",
                        "    if False:\n        error = Desync",
                    ),
                ),
            ),
        ),
    ),
    Fault(
        20,
        "crash loop",
        "stops after 3 restarts without a new commit, and says so",
        (
            f"{SUPERVISOR}::test_fault_20_a_crash_loop_stops_after_three_restarts",
            f"{SUPERVISOR}::test_what_would_come_again_is_not_started_again",
        ),
        (
            Defence(
                "restarts without a new commit are counted",
                (f"{SUPERVISOR}::test_fault_20_a_crash_loop_stops_after_three_restarts",),
                (Patch(MEMBERS, "        self._tries += 1\n", ""),),
            ),
            Defence(
                "errors that would come again are known",
                (f"{SUPERVISOR}::test_what_would_come_again_is_not_started_again",),
                (Patch(MEMBERS, '        if "final" in kinds:\n', "        if False:\n"),),
            ),
        ),
    ),
    Fault(
        21,
        "clocks that differ and jump",
        "one run in one folder; every duration is of a monotonic clock",
        (f"{CLOCKS}::test_ranks_with_other_clocks_make_one_run",),
        (
            Defence(
                "intervals are measured by a monotonic clock",
                (f"{CLOCKS}::test_ranks_with_other_clocks_make_one_run",),
                (
                    Patch(
                        "longskip/profiling/meter.py",
                        "        clock: Callable[[], float] = time.monotonic,\n",
                        "        clock: Callable[[], float] = lambda: time.time(),\n",
                    ),
                ),
            ),
        ),
    ),
    Fault(
        22,
        "shell signs, newlines and leading - in arguments, names and hostfiles",
        "refused, or passed on literally",
        (
            REFUSED,
            f"{WORDS}::test_signs_of_a_shell_are_passed_on_literally",
            "tests/launcher/test_hosts.py::test_what_is_refused",
            "tests/launcher/test_hosts.py::test_any_text_is_a_cluster_or_refused",
            "tests/test_house.py::test_no_pickle_and_no_shell",
        ),
        (
            Defence(
                "a run's name is a plain word",
                (f"{REFUSED}[arguments1]",),
                (
                    Patch(
                        "longskip/engine/config.py",
                        'name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]',
                        "name: Annotated[str, Field()]",
                    ),
                ),
            ),
            Defence(
                "a host's name is one",
                ("tests/launcher/test_hosts.py::test_what_is_refused",),
                (
                    Patch(
                        "longskip/launcher/hosts.py",
                        "    if len(name) > 253 or not _NAME.fullmatch(name):\n",
                        "    if len(name) > 253:\n",
                    ),
                ),
            ),
        ),
    ),
    Fault(
        23,
        "secrets in the environment or in the configuration",
        "in no log, checkpoint, report or child's command line",
        (
            f"{WORDS}::test_secrets_of_the_environment_are_written_nowhere",
            f"{WORDS}::test_secrets_of_a_url_are_written_nowhere",
            "tests/engine/test_secrets.py::test_secret_names",
            "tests/engine/test_secrets.py::test_redacted_at_every_depth_and_not_in_place",
        ),
        (
            Defence(
                "what a run was made with holds no variable of the environment",
                (f"{WORDS}::test_secrets_of_the_environment_are_written_nowhere",),
                (
                    Patch(
                        "longskip/engine/runs.py",
                        '        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),\n',
                        '        "environment": dict(os.environ),\n',
                    ),
                ),
            ),
            Defence(
                "URLs are shown without their secrets",
                ("tests/engine/test_secrets.py::test_redacted_at_every_depth_and_not_in_place",),
                (
                    Patch(
                        "longskip/engine/secrets.py",
                        "    text = _USER_OF_URL.sub(HIDDEN, text)\n",
                        "    return text\n    text = _USER_OF_URL.sub(HIDDEN, text)\n",
                    ),
                ),
            ),
            Defence(
                "a configuration with a URL that holds a password is refused",
                (f"{WORDS}::test_secrets_of_a_url_are_written_nowhere[user]",),
                (
                    Patch(
                        "longskip/engine/secrets.py",
                        "    return _PASSWORD_OF_URL.search(text) is not None or",
                        "    return False and",
                    ),
                ),
            ),
        ),
    ),
    Fault(
        24,
        "ports",
        "nothing listens beyond loopback unless the launch is over several nodes, and then at the chosen address; it is said",
        (
            "tests/engine/test_faults_and_runs.py::test_local_ranks_listen_on_loopback_only",
            f"{SUPERVISOR}::test_fault_24_the_store_listens_at_the_chosen_address_only",
            "tests/faults/test_listening.py::test_a_store_beyond_loopback_is_told_of_and_one_on_loopback_is_not",
        ),
        (
            Defence(
                "ranks of one machine meet at a store on loopback",
                ("tests/engine/test_faults_and_runs.py::test_local_ranks_listen_on_loopback_only",),
                (
                    Patch(
                        "longskip/engine/distributed.py",
                        'socket.create_server(("127.0.0.1", port)) if rank == 0',
                        'socket.create_server(("0.0.0.0", port)) if rank == 0',
                    ),
                ),
            ),
            Defence(
                "the supervisors' store listens at one address",
                (f"{SUPERVISOR}::test_fault_24_the_store_listens_at_the_chosen_address_only",),
                (
                    Patch(
                        "longskip/launcher/store.py",
                        "socket.create_server(target[:2], family=family",
                        'socket.create_server(("0.0.0.0", target[1]), family=family',
                    ),
                ),
            ),
            Defence(
                "a store that others reach is told of",
                ("tests/faults/test_listening.py::test_a_store_beyond_loopback_is_told_of_and_one_on_loopback_is_not",),
                (
                    Patch(
                        "longskip/launcher/supervisor.py",
                        "        if not is_loopback(self.endpoint.local):\n            say(",
                        "        if False:\n            say(",
                    ),
                ),
            ),
        ),
    ),
)
