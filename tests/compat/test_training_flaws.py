"""What went wrong with teachers, judges, data sets and distillation elsewhere, and the tests that show that it cannot here."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.compat.named_tests import can_fail, find_test

FLAWS = {
    "keys of the documented recipes are taken and never used": [
        "compat/test_training_spec.py::test_a_row_of_the_trainer_is_taken_under_its_name",
        "compat/test_training_spec.py::test_a_row_of_another_component_is_taken_there",
        "compat/test_training_spec.py::test_a_row_of_others_is_refused_with_where_it_goes",
    ],
    "a default configuration or a quickstart does not resolve": [
        "trainer/config/test_compose.py::test_every_preset_composes_and_is_valid",
        "launch/test_recipes.py::test_every_process_understands_its_part",
    ],
    "a reward function that raises or returns nothing kills or spoils the step": [
        "trainer/local/test_rewards.py::test_rewards_are_summed_over_the_functions_that_judged",
        "envs/test_reward_registry.py::test_a_broken_grader_is_no_reward_of_zero",
        "envs/test_base_env.py::test_a_reward_whose_own_task_group_met_only_infrastructure_failures_excludes_its_sequence",
    ],
    "a baseline template that nobody sets ends the first step": [
        "teaching/test_templates.py::test_the_built_in_templates_have_what_they_need",
        "teaching/test_templates.py::test_both_solutions_are_asked_for_in_one_format",
    ],
    "the loss sees another prompt than the one the teacher answered": [
        "teaching/test_teacher_env.py::test_the_trained_tokens_are_those_that_the_policy_sampled_after_its_own_prompt",
    ],
    "the teacher's server keeps its first weights, or the student's gets the teacher's": [
        "trainer/test_weight_routing.py::test_training_a_teacher_leaves_the_students_server_alone",
        "launch/test_commands.py::test_only_the_policys_server_gets_weights",
    ],
    "members of a group have prompts and baselines of their own": [
        "teaching/test_teacher_env.py::test_one_item_costs_one_probe_one_baseline_and_one_group_of_the_policy",
        "teaching/test_teacher_env.py::test_the_trained_tokens_are_those_that_the_policy_sampled_after_its_own_prompt",
    ],
    "the student's text is read with the teacher's tokenizer, and templates go out without a chat format": [
        "teaching/test_teacher_env.py::test_the_student_is_asked_in_chats_and_the_policy_by_token_ids",
    ],
    "options that log completions do nothing": [
        "teaching/test_teacher_env.py::test_groups_are_written_in_full_with_the_asked_probability",
        "trainer/reporting/test_completions_table.py::test_logged_completions_go_to_the_file_and_to_the_sink",
        "trainer/reporting/test_completions_table.py::test_how_many_are_shown",
    ],
    "judges get the teacher's text as the student's answer, and no plan or trace": [
        "teaching/test_teacher_env.py::test_judges_pay_and_see_the_whole_trajectory",
    ],
    "documented methods and figures of the judges do not exist": [
        "trainer/test_teacher.py::test_the_methods_ask_the_servers_without_a_training_run",
        "teaching/test_judges.py::test_what_judges_said_and_cost_is_logged",
        "rim/test_calls.py::test_the_figures_are_logged_where_there_is_a_logger",
    ],
    "a torch model as the reward ends in an import error": [
        "trainer/test_local.py::test_a_reward_model_of_tensors_is_refused_at_once",
    ],
    "options of the judges are never read": [
        "rim/test_reward.py::test_gaming_caps_the_reward_and_is_named",
        "rim/test_reward.py::test_thresholds_come_from_the_config",
        "rim/test_reward.py::test_the_small_model_is_asked_once_for_each_temperature_with_the_options_of_the_config",
        "rim/test_decisions.py::test_a_rule_can_be_changed_or_switched_off",
    ],
    "a prompt with braces cannot be rendered": [
        "rim/test_prompts.py::test_braces_in_values_are_left_alone",
        "rim/test_prompts.py::test_only_names_that_have_a_value_are_replaced",
        "teaching/test_templates.py::test_a_question_that_holds_json_is_rendered",
    ],
    "a judge that fails pays 0, like bad teaching": [
        "rim/test_failures.py::test_where_no_judge_is_left_there_is_no_score",
        "rim/test_calls.py::test_no_zero_is_paid_where_judges_fail",
        "teaching/test_teacher_env.py::test_what_judges_cannot_judge_is_left_out",
    ],
    "samples are judged one after another, and the breakdown is not what was paid": [
        "rim/test_reward.py::test_calls_in_flight_are_bounded_and_the_bound_is_used",
        "rim/test_reward.py::test_the_breakdown_holds_what_was_paid_and_what_was_said",
    ],
    "the split that is asked for is not the one that is read": [
        "data/test_loaders.py::test_arc_atlas_reads_the_split_that_is_asked_for",
    ],
    "the prompt holds the reference solution": [
        "data/test_loaders.py::test_gsm8k_asks_without_the_solution",
    ],
    "the evaluation's prompt holds the reference solution": [
        "trainer/supervised/test_gkd_trainer.py::test_evaluation_prompts_hold_no_word_of_the_assistants",
        "trainer/supervised/test_evaluation.py::test_a_question_has_no_turn_of_the_assistant",
    ],
    "fields at the top of a session are dropped": [
        "data/test_traces.py::test_fields_are_found_at_the_top_and_in_the_metadata",
    ],
    "the database has one variable in the documents and another in the code": [
        "data/test_postgres_urls.py::test_the_configuration_comes_before_the_variables",
        "data/test_postgres.py::test_the_url_may_stand_in_a_variable",
    ],
    "replies are found for three types of models only": [
        "data/test_chats.py::test_every_turn_of_the_assistant_is_trained_with_its_end",
        "data/test_chats.py::test_the_templates_own_spans_decide",
    ],
    "a recipe cannot be composed, for a key stands in it twice": [
        "trainer/config/test_compose.py::test_every_preset_composes_and_is_valid",
        "trainer/config/test_compose.py::test_a_key_that_stands_twice_in_a_file_is_refused_with_its_lines",
    ],
    "two vocabularies are compared place by place, and the teacher scores another completion than the student": [
        "trainer/supervised/test_other_tokenizer.py::test_one_vocabulary_cannot_be_asked_of_two_tokenizers",
        "trainer/supervised/test_other_tokenizer.py::test_a_span_has_the_teachers_logprob_of_its_text",
    ],
    "it is unclear which number of a launch is whose": [
        "compat/test_training_spec.py::test_processes_of_the_trainer_are_counted_by_name",
    ],
    "the launcher ends processes of others, edits the user's files and waits by the clock": [
        "launch/test_up.py::test_an_inference_server_that_runs_already_is_used_and_left_running",
        "trainer/test_trainer_cli.py::test_the_resolved_configuration_is_kept_in_the_run_folder_and_the_users_file_is_left_alone",
        "launch/test_processes.py::test_a_child_is_ready_when_its_check_says_so",
    ],
    "documented overrides are refused": [
        "trainer/config/test_compose.py::test_all_spellings_of_a_key_mean_the_key",
        "trainer/config/test_compose.py::test_all_spellings_of_a_preset_mean_the_preset",
        "trainer/test_methods.py::test_keys_of_the_data_set_are_written_with_and_without_their_section",
    ],
    "gains are computed after they were logged, from figures that nobody measures": [
        "trainer/supervised/test_gkd_trainer.py::test_an_evaluation_measures_divergence_success_and_length",
        "trainer/supervised/test_evaluation.py::test_without_a_baseline_nothing_is_compared",
    ],
    "beta has its ends the other way round": [
        "trainer/supervised/test_trl_jsd.py::test_the_ends_are_the_limits_of_the_divergence_over_its_weight",
        "trainer/supervised/test_trl_jsd.py::test_golden_values",
    ],
    "a cap on the length is not handed on": [
        "trainer/supervised/test_examples.py::test_long_examples_lose_their_end_and_are_counted",
        "trainer/supervised/test_gkd_trainer.py::test_max_seq_length_is_bounded_by_the_teachers_positions",
    ],
}
"""By what went wrong."""


@pytest.mark.parametrize("flaw", FLAWS)
def test_a_flaw_of_others_has_its_tests(flaw: str) -> None:
    assert FLAWS[flaw]
    assert [place for place in FLAWS[flaw] if not can_fail(find_test(place))] == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("def test_it():\n    assert 1\n", True),
        ("class TestIt:\n    async def test_it(self):\n        with pytest.raises(ValueError): f()\n", True),
        ("def test_it():\n    f()\n", False),
    ],
)
def test_a_test_that_checks_nothing_is_told_from_one_that_does(tmp_path: Path, text: str, expected: bool) -> None:
    (tmp_path / "it.py").write_text(text)

    assert can_fail(find_test(f"{tmp_path / 'it.py'}::test_it")) is expected


@pytest.mark.parametrize(
    "text", ["# def test_it():\n", "class It:\n    def test_it(self): assert 1\n", "test_it = 1\n"]
)
def test_what_pytest_does_not_run_is_no_test(tmp_path: Path, text: str) -> None:
    (tmp_path / "it.py").write_text(text)

    with pytest.raises(LookupError, match="test_it is no test"):
        find_test(f"{tmp_path / 'it.py'}::test_it")
