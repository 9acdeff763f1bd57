"""The SDK surface that environments written for Atropos 0.4.0 rely on: where each name lives and how it is called.

A line of CALLABLES is `<kind> <name>(<parameters>)`; kind: def, async, classmethod, staticmethod, property or
asynccontextmanager. What is indented further belongs to the line above. Annotations are left out: nobody depends on them.
"""

from __future__ import annotations

IMPORTS = {
    "atroposlib.envs.base": "APIServer APIServerConfig BaseEnv BaseEnvConfig EvalHandlingEnum Item Message OpenaiConfig "
    "ReasoningConfig ScoredDataGroup ScoredDataItem ServerBaseline ServerManager ServerManagerConfig UUID",
    "atroposlib.envs": "APIServerConfig BaseEnv BaseEnvConfig EvalHandlingEnum ScoredDataGroup ServerBaseline ServerManager",
    "atroposlib.envs.constants": "ENV_NAMESPACE NAMESPACE_SEP OPENAI_NAMESPACE SERVER_MANAGER_NAMESPACE",
    "atroposlib.envs.eval": "EvalBase eval_runner evaluate_log pass_at_k",
    "atroposlib.envs.teacher_distillation_env": "TeacherDistillationConfig TeacherDistillationEnv",
    "atroposlib.envs.reward_fns": "CombinedReward RewardFunction registry",
    "atroposlib.envs.reward_fns.registry": "LegacyFunctionWrapper RewardRegistry registry",
    "atroposlib.envs.reward_fns.reward_function": "RewardFunction",
    "atroposlib.envs.reward_fns.combined_reward": "CombinedReward",
    "atroposlib.envs.reward_fns.accuracy_reward": "AccuracyReward accuracy_reward",
    "atroposlib.envs.reward_fns.format_reward": "FormatReward format_reward",
    "atroposlib.envs.reward_fns.r1_reward": "AccuracyXReward FormatReasoningReward R1Reward "
    "format_reasoning_reward parse_reasoning_response r1_reward",
    "atroposlib.envs.reward_fns.reasoning_steps_reward": "ReasoningStepsReward reasoning_steps_reward",
    "atroposlib.envs.reward_fns.repetition_penalty_reward": "RepetitionPenaltyReward repetition_penalty_reward",
    "atroposlib.envs.reward_fns.cosine_scaled_reward": "CosineScaledReward cosine_scaled_reward",
    "atroposlib.envs.reward_fns.crossword_format_reward": "CrosswordFormatReward crossword_format_reward",
    "atroposlib.envs.reward_fns.cascading_r1_math_reward": "cascading_r1_math_reward",
    "atroposlib.envs.reward_fns.chandas_meter_reward": "ChandasMeterReward",
    "atroposlib.envs.server_handling.managed_server": "DummyManagedServer ManagedServer ManagedServerAdapter SequenceNode",
    "atroposlib.envs.server_handling.managed_server_proxy": "create_app main openai_error",
    "atroposlib.envs.server_handling.openai_server": "APIServerConfig OpenAIServer resolve_openai_configs",
    "atroposlib.envs.server_handling.proxy_client": "ProxyManagedServer create_proxy_session",
    "atroposlib.envs.server_handling.server_baseline": "APIServer APIServerConfig AsyncSemWithAdaptiveWeight "
    "ReasoningConfig ServerBaseline VALID_REASONING_EFFORTS",
    "atroposlib.envs.server_handling.server_harness": "ServerHarness create_chat_completion create_completion",
    "atroposlib.envs.server_handling.server_manager": "APIServerConfig ServerBaseline ServerManager ServerManagerConfig",
    "atroposlib.envs.server_handling.sglang_server": "SGLangServer",
    "atroposlib.envs.server_handling.tool_call_translator": "ToolCallTranslator VLLM_AVAILABLE",
    "atroposlib.envs.server_handling.trl_vllm_server": "TrlVllmServer",
    "atroposlib.envs.server_handling.vllm_server": "VLLMServer",
    "atroposlib.frontend.jsonl2html": "create_html_for_group generate_html get_score_class",
    "atroposlib.type_definitions": "AgentHistory AgentStep Content EvaluationConfigGeneral EvaluationMetrics "
    "EvaluationResults EvaluationSample GameHistory GameStep Item Message Observation UUID number",
    "atroposlib.utils.advantages": "allclose_to_first compute_discounted_returns "
    "compute_grpo_process_supervision_advantages compute_stats",
    "atroposlib.utils.best_of_n_selection": "select_best_index",
    "atroposlib.utils.cli": "adjust_model_defaults extract_namespace get_double_dash_flags get_prefixed_pydantic_model merge_dicts",
    "atroposlib.utils.display": "display_metrics_table",
    "atroposlib.utils.force_diverse_samples": "generate_with_diverse_first_tokens",
    "atroposlib.utils.io": "parse_http_response",
    "atroposlib.utils.message_history_utils": "ensure_trajectory_token_limit strip_thinking truncate_thinking",
    "atroposlib.utils.metrics": "get_std_min_max_avg",
    "atroposlib.utils.tokenize_for_trainer": "UNMASKED_ROLES tokenize_for_trainer tokenize_for_trainer_dpo",
    "atroposlib.utils.tokenizers.qwen_fixed_tokenizer": "QwenFixedTokenizer",
    "atroposlib.utils.tool_call_parser": "extract_tool_call parse_tool_call",
}
"""By module, the names that can be imported from it."""

CALLABLES = {
    "atroposlib.api.utils": """
        def find_groups_summing_to_target(buffer, target_size)
        def grab_batch_with_minimum_allocations(queue, batch_size, env_configs)
        def grab_exact_from_heterogeneous_queue(queue, batch_size)
    """,
    "atroposlib.envs.base": """
        async BaseEnv.evaluate(self, *args, **kwargs)
        async BaseEnv.get_next_item(self)
        async BaseEnv.setup(self)
        def BaseEnv.__init__(self, config, server_configs, slurm=False, testing=False)
        classmethod BaseEnv.cli(cls)
        async BaseEnv.collect_trajectories(self, item)
        classmethod BaseEnv.config_init(cls)
        async BaseEnv.wandb_log(self, wandb_metrics=None)
        def BaseEnv.save_checkpoint(self, step, data=None)
        async BaseEnv.create_rollout_table(self, wandb_metrics)
        async BaseEnv.add_rollouts_for_wandb(self, scored_data, item=None)
        async BaseEnv.evaluate_log(self, metrics, task_name=None, model_name=None, start_time=None, end_time=None,
            generation_parameters=None, samples=None, verbose=True)
        async BaseEnv.collect_trajectory(self, item)
        async BaseEnv.cleanup(self)
        def BaseEnv.load_checkpoint(self)
        async BaseEnv.postprocess_histories(self, trajectories)
        async BaseEnv.add_train_workers(self)
        async BaseEnv.env_step_checks(self)
        async BaseEnv.get_server_info(self)
        async BaseEnv.handle_send_to_api(self, scored_data, item=None, do_send_to_api=True,
            abort_on_any_max_length_exceeded=True)
        def BaseEnv.perf_stats(self, metrics_dict)
        async BaseEnv._send_scored_data_to_api(self, scored_data)
        property BaseEnv.derived_batch_size(self)
        async BaseEnv.env_manager(self)
        classmethod BaseEnv.get_cli_evaluate_config_cls(cls)
        classmethod BaseEnv.get_cli_process_config_cls(cls)
        classmethod BaseEnv.get_cli_serve_config_cls(cls)
        async BaseEnv.get_status(self)
        async BaseEnv.handle_env(self, item_uuid)
        async BaseEnv.process_manager(self)
        async BaseEnv.register_env(self)
        async BaseEnv.setup_wandb(self)
    """,
    "atroposlib.envs.eval": """
        def EvalBase.__init__(self, pass_at_n=1, pass_at_n_samples=1, **kwargs)
        async EvalBase.chat_completion(self, server, messages)
        def EvalBase.get_generation_params(self)
        async EvalBase.run_item(self, server, data_item)
        def EvalBase.setup_data(self)
        async eval_runner(eval_env)
        def evaluate_log(metrics, eval_dir=None, task_name=None, model_name=None, start_time=None, end_time=None,
            generation_parameters=None, samples=None, verbose=True)
        def pass_at_k(m, c, k)
    """,
    "atroposlib.envs.reward_fns.combined_reward": """
        def CombinedReward.compute(self, completions, **kwargs)
        property CombinedReward.name(self)
        def CombinedReward.set_wandb_logger(self, logger)
    """,
    "atroposlib.envs.reward_fns.registry": """
        def LegacyFunctionWrapper.__init__(self, func, weight=1.0, **kwargs)
        def LegacyFunctionWrapper.compute(self, completions, **kwargs)
        property LegacyFunctionWrapper.name(self)
        def RewardRegistry.create(self, name_or_config, **kwargs)
        def RewardRegistry.register(self, cls=None, name=None)
        def RewardRegistry.get(self, name)
        def RewardRegistry.list_registered(self)
        def RewardRegistry.load_required_functions(self, config)
        def RewardRegistry.register_function(self, name, function)
    """,
    "atroposlib.envs.reward_fns.reward_function": """
        def RewardFunction.compute(self, completions, **kwargs)
        staticmethod RewardFunction.get_content(completion)
        def RewardFunction.log_metrics(self, raw_rewards, weighted_rewards)
        property RewardFunction.name(self)
        def RewardFunction.set_wandb_logger(self, logger)
    """,
    "atroposlib.envs.server_handling.managed_server": """
        def DummyManagedServer.__init__(self, server, tokenizer=None, track_tree=False)
        async DummyManagedServer.chat_completion(self, **kwargs)
        async DummyManagedServer.completion(self, **kwargs)
        async DummyManagedServer.get_logprobs(self, **kwargs)
        def DummyManagedServer.get_state(self)
        def DummyManagedServer.reset(self)
        def ManagedServer.get_state(self)
        async ManagedServer.chat_completion(self, **kwargs)
        async ManagedServer.completion(self, **kwargs)
        def ManagedServer.__init__(self, server, tokenizer=None, track_tree=False, tool_parser=None,
            preserve_think_blocks=False)
        def ManagedServer._convert_messages_to_prompt(self, messages, tools=None)
        def ManagedServer._get_translator(self)
        async ManagedServer.get_logprobs(self, **kwargs)
        def ManagedServer.reset(self)
        def ManagedServerAdapter.__init__(self, managed_server, base_url)
        def ManagedServerAdapter.copy(self, **kwargs)
        async ManagedServerAdapter.post(self, path, body, cast_to)
    """,
    "atroposlib.envs.server_handling.managed_server_proxy": """
        def create_app(server_manager, tokenizer, model_name='unknown')
        def main()
        def openai_error(status_code, message, error_type='invalid_request_error')
    """,
    "atroposlib.envs.server_handling.openai_server": """
        def OpenAIServer.__init__(self, config, reasoning_config=None)
        async OpenAIServer.check_server_status_task(self, chat_completion=True)
    """,
    "atroposlib.envs.server_handling.proxy_client": """
        def ProxyManagedServer.__init__(self, proxy_url, session_uuid, model_name='unknown', base_url=None)
        async ProxyManagedServer.chat_completion(self, **kwargs)
        async ProxyManagedServer.cleanup(self)
        async ProxyManagedServer.completion(self, **kwargs)
        async ProxyManagedServer.fetch_state(self)
        def ProxyManagedServer.get_state(self)
        def ProxyManagedServer.get_url(self)
        def ProxyManagedServer.reset(self)
        async create_proxy_session(proxy_url, base_url=None, tool_parser='hermes', track_tree=False,
            model_name='unknown')
    """,
    "atroposlib.envs.server_handling.server_baseline": """
        async APIServer.chat_completion(self, **kwargs)
        async APIServer.wandb_metrics(self, metrics_dict, server_name)
        def APIServer.__init__(self, config, reasoning_config=None)
        async APIServer._chat_completion_wrapper(self, **kwargs)
        async APIServer._completion_wrapper(self, **kwargs)
        async APIServer._get_logprobs_wrapper(self, **kwargs)
        def APIServer._inject_reasoning_kwargs(self, kwargs)
        async APIServer._tokens_and_logprobs_completion_wrapper(self, **kwargs)
        async APIServer.check_server_status_task(self, chat_completion=True)
        async APIServer.completion(self, **kwargs)
        async APIServer.get_logprobs(self, **kwargs)
        async APIServer.tokens_and_logprobs_completion(self, **kwargs)
        async APIServer.update_weight(self, weight)
        def AsyncSemWithAdaptiveWeight.__init__(self, value)
        async AsyncSemWithAdaptiveWeight.acquire(self)
        def AsyncSemWithAdaptiveWeight.locked(self)
        def AsyncSemWithAdaptiveWeight.min_val(self)
        def AsyncSemWithAdaptiveWeight.release(self)
        def AsyncSemWithAdaptiveWeight.update_weight(self, weight)
        def ReasoningConfig.build_extra_body(self, base_url=None, use_max_tokens=False)
        classmethod ReasoningConfig.from_env_config(cls, env_config)
        def ReasoningConfig.is_reasoning_kwargs_active(self)
    """,
    "atroposlib.envs.server_handling.server_harness": """
        def ServerHarness.__init__(self)
        async ServerHarness.chat_completion(self, *args, **kwargs)
        async ServerHarness.completion(self, *args, **kwargs)
        def ServerHarness.conv_to_dictkey(self, input_message)
        def ServerHarness.set_desired_completion(self, input_message, completion)
        def ServerHarness.set_desired_response(self, input_message, desired_response)
        def ServerHarness.set_tokens_and_logprobs_response(self, prompt, prompt_tokens, output_tokens_list,
            output_logprobs_list, finish_reasons)
        async ServerHarness.tokens_and_logprobs_completion(self, **kwargs)
        async ServerHarness.update_weight(self, weight)
        def create_chat_completion(resp, n=1, finish_reason='stop')
        def create_completion(resp, n=1, finish_reason='stop')
    """,
    "atroposlib.envs.server_handling.server_manager": """
        async ServerManager.chat_completion(self, **kwargs)
        asynccontextmanager ServerManager.managed_server(self, tokenizer=None, base_url=None, preserve_think_blocks=False)
        async ServerManager.completion(self, **kwargs)
        asynccontextmanager ServerManager.dedicated_server(self)
        def ServerManager.__init__(self, configs, server_class=APIServer, slurm=False, testing=False,
            max_n_completions=8, reasoning_config=None, proxy_url=None, use_proxy=False, tool_parser=None)
        async ServerManager.get_logprobs(self, **kwargs)
        async ServerManager.tokens_and_logprobs_completion(self, **kwargs)
        async ServerManager.update_weight(self, weight)
        async ServerManager.wait_for_sem(self, is_training)
    """,
    "atroposlib.envs.server_handling.sglang_server": """
        def SGLangServer.__init__(self, config, reasoning_config=None)
        async SGLangServer.check_server_status_task(self, chat_completion=True)
    """,
    "atroposlib.envs.server_handling.tool_call_translator": """
        def ToolCallTranslator.__init__(self, tokenizer, parser_name='hermes')
        def ToolCallTranslator.convert_messages_for_template(self, messages)
        def ToolCallTranslator.decode_with_tool_awareness(self, token_ids, has_tools=False)
        def ToolCallTranslator.parse_model_output(self, raw_text, tool_choice=None, tools=None)
        def ToolCallTranslator.reconstruct_raw_text_from_tool_calls(self, tool_calls)
    """,
    "atroposlib.envs.server_handling.trl_vllm_server": """
        def TrlVllmServer.__init__(self, config, reasoning_config=None)
        async TrlVllmServer.check_server_status_task(self, chat_completion=True)
    """,
    "atroposlib.envs.server_handling.vllm_server": """
        def VLLMServer.__init__(self, config, reasoning_config=None)
        async VLLMServer.check_server_status_task(self, chat_completion=True)
    """,
    "atroposlib.envs.teacher_distillation_env": """
        def TeacherDistillationEnv.__init__(self, config, server_configs, teacher_server_configs=None, slurm=False,
            testing=False)
        async TeacherDistillationEnv._attach_teacher_distillation(self, group)
        async TeacherDistillationEnv._fetch_teacher_for_sequence(self, token_ids, top_k)
        classmethod TeacherDistillationEnv._resolve_teacher_server_configs(cls, default_teacher_server_configs,
            yaml_config, cli_passed_flags)
        def TeacherDistillationEnv._validate_teacher_tokenizer_compatibility(self, teacher_tokenizer_name)
        classmethod TeacherDistillationEnv.get_cli_serve_config_cls(cls)
        async TeacherDistillationEnv.handle_send_to_api(self, scored_data, item=None, do_send_to_api=True,
            abort_on_any_max_length_exceeded=True)
        classmethod TeacherDistillationEnv.teacher_config_init(cls)
    """,
    "atroposlib.frontend.jsonl2html": """
        def create_html_for_group(group_data, index)
        def generate_html(input_path, output_path=None)
    """,
    "atroposlib.utils.advantages": """
        def allclose_to_first(values, rtol=1e-05, atol=1e-08, equal_nan=False, return_vector=False)
        def compute_discounted_returns(rewards, gamma)
        def compute_grpo_process_supervision_advantages(rewards, gamma=None, std_tol=1e-08)
        def compute_stats(data)
    """,
    "atroposlib.utils.best_of_n_selection": """
        def select_best_index(primary_scores, secondary_scores, primary_higher_is_better=True,
            secondary_lower_is_better=True)
    """,
    "atroposlib.utils.io": """
        async parse_http_response(resp, logger=None)
    """,
    "atroposlib.utils.message_history_utils": """
        def ensure_trajectory_token_limit(trajectory, tokenizer, max_trajectory_tokens)
        def truncate_thinking(response_text, tokenizer, max_think_tokens)
    """,
    "atroposlib.utils.tokenize_for_trainer": """
        def tokenize_for_trainer(tokenizer, chat, include_messages=False, train_on_all_assistant_turns=False,
            finish_reason='')
    """,
    "atroposlib.utils.tool_call_parser": """
        def parse_tool_call(response, available_tools=None, preferred_tags=None)
    """,
    "atroposlib.utils.cli": """
        def get_prefixed_pydantic_model(base_model, prefix)
        def merge_dicts(*dicts)
        def extract_namespace(model, prefix)
        def adjust_model_defaults(model_class, defaults)
        def get_double_dash_flags()
    """,
    "atroposlib.utils.display": """
        def display_metrics_table(task_name, metrics, start_time, end_time)
    """,
    "atroposlib.utils.force_diverse_samples": """
        async generate_with_diverse_first_tokens(self, messages, prefill='', n=8, max_tokens=4096, temperature=1.0)
    """,
    "atroposlib.utils.metrics": """
        def get_std_min_max_avg(name, data, metrics_dict)
    """,
    "atroposlib.envs.reward_fns.accuracy_reward": """
        def accuracy_reward(completions, solution=None, ground_truth=None)
    """,
    "atroposlib.envs.reward_fns.format_reward": """
        def format_reward(completions, preferred_tags=None)
    """,
    "atroposlib.envs.reward_fns.r1_reward": """
        def parse_reasoning_response(text)
    """,
    "atroposlib.envs.reward_fns.repetition_penalty_reward": """
        def repetition_penalty_reward(completions, threshold=0.05)
    """,
}
"""By module, what is defined there and how it is called."""
