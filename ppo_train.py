"""Policy optimisation of a solver from rewards: PPO with a value model, or group baselines; tensor- and data-parallel.

    torchrun --nproc_per_node 8 ppo_train.py --actor_ckpt_dir SOLVER --actor_save_dir OUT --critic_ckpt_dir VERIFIER \
        --critic_save_dir OUT2 --reward_model_ckpt_dir VERIFIER --train_file train.json --max_batch_size 6 --max_buffer_size 96
    torchrun --nproc_per_node 8 ppo_train.py --actor_ckpt_dir SOLVER --actor_save_dir OUT --train_file train.json \
        --advantage grpo --samples_per_prompt 8 --reward rule --task GSM8K

Rows of the train file: {"instruction": "...", "label": "..."}; the label is needed for the rule. Nothing is read from disk
between the phases: the roles stay in memory, on the device or (--offload) the host's. What the code must satisfy, every knob,
and the meaning of every logged number: docs/ppo.md.
"""

from functools import partial
from typing import Literal

from src.cli import run


def main(
    actor_ckpt_dir: str,
    actor_save_dir: str,
    train_file: str,
    critic_ckpt_dir: str | None = None,
    critic_save_dir: str | None = None,
    reward_model_ckpt_dir: str | None = None,
    reward: list[str] | None = None,
    reward_weights: list[float] | None = None,
    reward_file: str | None = None,
    format_pattern: str | None = None,
    overlong_margin: int | None = None,
    reward_scale: float = 1.0,
    reward_bias: float = 0.0,
    reward_clip: float | None = None,
    reward_norm: bool = False,
    advantage: Literal["gae", "grpo", "dr_grpo", "rloo", "reinforce++"] = "gae",
    samples_per_prompt: int = 1,
    filter_rounds: int = 0,
    model_type: str | None = None,
    tokenizer_file: str | None = None,
    reward_tokenizer_file: str | None = None,
    config_file: str | None = None,
    use_chat_template: bool = False,
    max_batch_size: int = 6,
    max_tokens_per_batch: int | None = None,
    max_buffer_size: int = 96,
    rollout_batch_size: int = 384,
    kv_cache_gb: float | None = None,
    max_seq_len: int = 1024,
    max_new_tokens: int = 256,
    min_new_tokens: int = 0,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    replay_mask: bool = False,
    lr: float = 1e-6,
    critic_lr: float = 5e-6,
    warmup: float = 0.0,
    schedule: Literal["cosine", "linear", "constant"] = "constant",
    epochs: int = 1,
    iterations: int | None = None,
    ppo_epochs: int = 4,
    mini_batches: int = 4,
    critic_warmup: int = 0,
    update: Literal["together", "in_turn"] = "together",
    gamma: float = 1.0,
    lam: float = 0.95,
    lam_critic: float | None = None,
    whiten: bool | None = None,
    value_norm: bool = False,
    cliprange: float = 0.2,
    cliprange_high: float | None = None,
    dual_clip: float | None = None,
    cliprange_value: float = 0.2,
    vf_coef: float = 0.1,
    entropy_coef: float = 0.0,
    loss_level: Literal["token", "sequence", "constant"] | None = None,
    kl: Literal["k1", "k2", "k3"] | None = None,
    kl_coef: float | None = None,
    kl_target: float | None = None,
    kl_horizon: float = 10000.0,
    target_kl: float | None = None,
    ref_ema: float | None = None,
    ptx_file: str | None = None,
    ptx_coef: float = 0.0,
    ptx_batch_size: int | None = None,
    truncated: Literal["bootstrap", "zero", "penalty"] = "bootstrap",
    truncation_penalty: float = 1.0,
    max_grad_norm: float = 1.0,
    max_skipped_steps: int = 30,
    weight_decay: float = 0.0,
    lora_rank: int = -1,
    lora_alpha: float | None = None,
    lora_targets: list[str] | None = None,
    shared_trunk: bool = False,
    offload: bool = False,
    quantize: Literal["nf4", "int8"] | None = None,
    freeze_layers: int = 0,
    router_aux_loss_coef: float | None = None,
    checkpoint_activations: Literal["none", "selective", "full"] = "none",
    compile: bool = False,
    zero: Literal[0, 1] = 1,
    task: str | None = None,
    label_file: str | None = None,
    eval_every: int | None = None,
    keep_best: str | None = None,
    eval_batch_size: int = 384,
    dump_rollouts: str | None = None,
    log_samples: int = 2,
    save_every: int | None = None,
    keep: int = 2,
    resume: str = "auto",
    log_dir: str | None = None,
    dtype: Literal["bf16", "fp16", "fp32"] | None = None,
    seed: int = 0,
    model_parallel_size: int | None = None,
    rollout_model_parallel_size: int | None = None,
    critic_model_parallel_size: int | None = None,
    reward_model_parallel_size: int | None = None,
    timeout: float = 1800.0,
):
    """Train, and evaluate before the first and after every epoch when --task and --label_file are given.

    Args:
        actor_ckpt_dir: the solver to start from; also the reference.
        actor_save_dir: the folder for the trained policy; replaced as a whole when it already holds a checkpoint.
        train_file: .json or .jsonl rows with "instruction", and "label" for a rule.
        critic_ckpt_dir: what the value model starts from: the verifier, usually. For --advantage gae.
        critic_save_dir: the folder for the trained value model.
        reward_model_ckpt_dir: the verifier whose scores are the reward. With another tokenizer than the actor's it reads the texts.
        reward: what is rewarded, one or several of verifier (its score), rule (1 for a right answer), file (--reward_file), format
            (1 where --format_pattern matches), length (share of max_new_tokens), overlong (0 to -1, see --overlong_margin);
            verifier when not given.
        reward_weights: one for each of --reward; 1 each when not given.
        reward_file: FILE.py:FUNCTION, called as function(prompts, responses, rows), lists of the same length, for a list of numbers.
        format_pattern: a regular expression to be found in the response.
        overlong_margin: the last so many tokens before max_new_tokens cost up to 1, in a line.
        reward_scale: the sum of the rewards is multiplied by this,
        reward_bias: this is added,
        reward_clip: and it is clipped to ± this.
        reward_norm: before that, centre and scale it by the mean and standard deviation of all rewards so far.
        advantage: gae (PPO with a value model); or without one: grpo, dr_grpo, rloo (each prompt's samples are compared),
            reinforce++ (rewards to go).
        samples_per_prompt: rollouts of each prompt.
        filter_rounds: leave out prompts whose samples all earn the same, and generate for others up to so many times in all to
            fill the buffer; 0 keeps everything.
        model_type: a name such as llama-2-7b to check the actor's sizes against.
        tokenizer_file: found in actor_ckpt_dir when not given.
        reward_tokenizer_file: the verifier's; found in its folder, or the actor's, when not given.
        config_file: the actor's params.json or config.json; found in actor_ckpt_dir when not given.
        use_chat_template: write each instruction as a user's turn, by the checkpoint's chat template or the family's.
        max_batch_size: sequences in one forward and backward, per data-parallel rank.
        max_tokens_per_batch: and their tokens, at most; a longer row goes alone. Optimizer steps stay the same: there are more
            forwards in each. No limit when not given.
        max_buffer_size: rollouts per iteration, over all ranks.
        rollout_batch_size: sequences generated at a time, at most.
        kv_cache_gb: memory for keys and values per rank; half the free memory when not given.
        max_seq_len: prompt and response together; prompts that leave no room are left out and counted.
        max_new_tokens: of one response.
        min_new_tokens: before so many no response ends by itself.
        temperature: of sampling, and of every log-probability.
        top_p: sample from the likeliest tokens that together have this probability.
        top_k: sample from so many of the likeliest tokens; 0: all.
        min_p: leave out tokens less likely than this share of the likeliest.
        replay_mask: take log-probabilities over the tokens that sampling had left, in the update too; else over all.
        lr: the policy's highest learning rate.
        critic_lr: the value model's.
        warmup: share of the iterations in which the learning rates rise.
        schedule: how they fall afterwards.
        epochs: passes over the train file.
        iterations: stop after this many, whatever the epochs.
        ppo_epochs: passes over each buffer of rollouts.
        mini_batches: optimizer steps per pass.
        critic_warmup: iterations in which only the value model learns.
        update: policy and value step by step (together), or first all of the policy's steps (in_turn): with --offload one at a time.
        gamma: discount.
        lam: of generalised advantage estimation.
        lam_critic: of the returns that the value model learns; lam when not given.
        whiten: centre and scale the advantages over the whole batch; when not given, for gae and reinforce++.
        value_norm: let the value model learn returns centred and scaled by their running mean and standard deviation.
        cliprange: the probability ratio is clipped to 1 ± this.
        cliprange_high: the upper side, where it is another ("clip-higher").
        dual_clip: for a negative advantage the loss is at most this times its size.
        cliprange_value: values are clipped to the old ones ± this.
        vf_coef: weight of the value loss (the value model has its own optimizer: it acts through clipping and Adam's ε).
        entropy_coef: weight of the entropy bonus.
        loss_level: the mean over all tokens (token), over responses of their tokens' means (sequence), or of their tokens' sums over
            max_new_tokens (constant); when not given sequence for grpo, constant for dr_grpo, else token.
        kl: the penalty in the reward (k1), or as a loss (k2, k3); when not given k3 for grpo and dr_grpo, else k1.
        kl_coef: its weight; 0.05, or where the actor's own PPO run left off, when not given. 0: no reference is loaded.
        kl_target: steer kl_coef towards this KL (nats per response).
        kl_horizon: how slowly, in responses.
        target_kl: end the policy's steps of an iteration once a step's approxkl is above this.
        ref_ema: after each iteration reference = this × reference + the rest × policy; without it the reference stays.
        ptx_file: rows with "instruction" and "output" to go on training on, beside the rewards,
        ptx_coef: with this weight,
        ptx_batch_size: so many in each of the policy's steps; as many as rollouts when not given.
        truncated: what follows a response cut at max_new_tokens: its value (bootstrap), nothing (zero), or nothing and a
            penalty on its score. Without a value model bootstrap is zero.
        truncation_penalty: that penalty.
        max_grad_norm: each model's gradient is scaled down to this norm.
        max_skipped_steps: stop after so many steps in a row whose gradient norm was not finite; each is skipped, and counted.
        weight_decay: AdamW's, on matrices.
        lora_rank: rank of the policy's and the value model's adapters; -1 trains all weights.
        lora_alpha: the adapter's output is scaled by lora_alpha / lora_rank; 16 when not given.
        lora_targets: layers to adapt, of wq,wk,wv,wo,w1,w2,w3; all of them when not given (with experts: attention's).
        shared_trunk: one frozen trunk, the actor's, for all roles: value and reward are adapters and heads on it. Their folders hold
            such adapters (verifier_train.py --lora_rank, from the actor's weights); a critic_ckpt_dir that is the actor's starts anew.
        offload: keep each role, and its optimizer, in host memory while it is not needed.
        quantize: keep the frozen weights in 4 or 8 bits; needs --lora_rank.
        freeze_layers: train neither the embedding nor this many layers from the bottom.
        router_aux_loss_coef: weight of the experts' load-balancing loss; the model's own when not given.
        checkpoint_activations: what of each block is computed again in backward, to save memory: nothing (none), all but products
            and attention (selective), or all but its input (full).
        compile: let torch.compile make one kernel each of the norms and of SwiGLU; on the CPU that needs a C++ compiler.
        zero: 1 shares the optimizer's state among the data-parallel ranks (ZeRO stage 1); 0 keeps it whole on each.
        task: what to evaluate on, such as GSM8K or MATH; also whose rule is applied in the reward (GSM8K's when not given).
        label_file: the task's rows.
        eval_every: evaluate every so many iterations; after each epoch when not given.
        keep_best: a metric of the evaluation, such as accuracy: the policy is also saved, to ACTOR_SAVE_DIR-best, whenever it is higher
            than ever.
        eval_batch_size: sequences generated at a time in evaluations, at most.
        dump_rollouts: a folder for one Parquet file per iteration: texts, tokens, log-probabilities, values, rewards, advantages.
        log_samples: responses of each iteration that are logged as text, with their rewards.
        save_every: keep what is needed to go on, in ACTOR_SAVE_DIR-state, every so many iterations; without it only when a signal ends the run.
        keep: so many of the newest of these stay.
        resume: auto goes on from the newest there, if the run is the same (a finished one says so); none begins anew; or the path of
            one of them.
        log_dir: for the log, TensorBoard events and evaluation results; ACTOR_SAVE_DIR-logs when not given.
        dtype: of weights and activations; bf16 on a GPU and fp32 on the CPU when not given.
        seed: of everything random.
        model_parallel_size: ranks per model; all of them when not given.
        rollout_model_parallel_size: ranks per model while generating, a divisor of --model_parallel_size: more, smaller models,
            whose weights change hands in memory. The same as in training when not given.
        critic_model_parallel_size: ranks per value model, a divisor of --model_parallel_size.
        reward_model_parallel_size: ranks per verifier, a divisor of --model_parallel_size.
        timeout: seconds that a collective may take before the run is given up.
    """
    settings = dict(locals())
    from src.checkpoint.folder import beside, check_apart
    from src.checkpoint.save import check_save, save_model
    from src.errors import UserError
    from src.evaluation.tasks import find_task
    from src.evaluation.training import KeepBest, SolverEvaluation
    from src.generation.engine import Engine
    from src.generation.relayout import RelaidEngine
    from src.generation.sampling import Sampling
    from src.inputs import Model, check_flags, check_log_dir, ppo_prompts, solver_sequences
    from src.logs import RunLog
    from src.parallel.setup import agreed, pick_dtype, start, stop
    from src.ppo.dump import RolloutDump, SampleTexts
    from src.ppo.fit import DEFAULT_KL_COEF, STATE_FILE, Schedule, changed_rewards, fit, read_state
    from src.ppo.rewards import load_score
    from src.ppo.settings import PPOSettings, check_flags_together
    from src.ppo.setup import load_roles, make_rewards, open_roles
    from src.ppo.trainer import PPO, KLController, PretrainingMix
    from src.trainer.saving import Earlier, Saving

    check_flags(settings)
    check_flags_together(settings)
    sampling = Sampling(
        max_new_tokens, temperature, top_p, top_k, seed, min_p, min_new_tokens=min_new_tokens
    )
    plan = Schedule(
        lr, critic_lr, warmup, schedule, epochs, iterations, seed, eval_every, max_skipped_steps
    )
    ppo_settings = PPOSettings.of(settings)
    parallel = start(model_parallel_size, timeout)
    if max_buffer_size < parallel.dp_size:
        raise UserError(
            f"--max_buffer_size {max_buffer_size}: the {parallel.dp_size} data-parallel ranks share the rollouts, "
            "and each needs one: raise it, or --model_parallel_size"
        )
    for flag in ("rollout", "critic", "reward"):
        size = settings[f"{flag}_model_parallel_size"]
        if size is not None and parallel.mp_size % size:
            raise UserError(
                f"--{flag}_model_parallel_size {size} does not divide the {parallel.mp_size} ranks that share a model in "
                "training (--model_parallel_size)"
            )
    number_type, logs = (
        pick_dtype(dtype, parallel.device),
        log_dir or beside(actor_save_dir, "logs"),
    )
    best_dir = beside(actor_save_dir, "best") if keep_best else None

    def read_inputs():
        read = {
            "actor_ckpt_dir": actor_ckpt_dir,
            "critic_ckpt_dir": critic_ckpt_dir,
            "reward_model_ckpt_dir": reward_model_ckpt_dir,
            "train_file": train_file,
            "ptx_file": ptx_file,
        }
        saved = {
            "actor_save_dir": actor_save_dir,
            "critic_save_dir": critic_save_dir,
            "keep_best": best_dir,
        }
        check_log_dir(logs, actor_ckpt_dir, critic_ckpt_dir, reward_model_ckpt_dir)
        saved = {flag: path for flag, path in saved.items() if path is not None}
        check_apart(saved, {**read, "log_dir": logs, "dump_rollouts": dump_rollouts})
        if dump_rollouts is not None:
            check_log_dir(dump_rollouts, actor_ckpt_dir, critic_ckpt_dir, reward_model_ckpt_dir)
        opened = open_roles(settings, parallel, number_type)
        tokenizer = opened.actor.tokenizer
        if best_dir:
            check_save(best_dir, opened.actor.checkpoint, number_type)
        evaluation = SolverEvaluation.read(
            task, label_file, eval_batch_size, max_new_tokens, max_seq_len
        )
        KeepBest.check(keep_best, eval_every, evaluation.metrics)
        rule = find_task(task or "GSM8K") if "rule" in (reward or []) else None
        if reward_file is not None:
            load_score(reward_file)
        prompts, warning = ppo_prompts(train_file, tokenizer, rule, max_seq_len)
        warnings = [warning]
        mix = []
        if ptx_file is not None:
            mix, warning = solver_sequences(ptx_file, tokenizer, max_seq_len, strict=False)
            warnings.append(warning)
        states = read_state(actor_ckpt_dir), read_state(critic_ckpt_dir) if critic_ckpt_dir else {}
        return opened, evaluation, rule, prompts, mix, states, [w for w in warnings if w]

    opened, evaluation, rule, prompts, mix, states, warnings = agreed(read_inputs)
    kl_control = KLController(
        states[0].get("kl_coef", DEFAULT_KL_COEF) if kl_coef is None else kl_coef,
        kl_target,
        kl_horizon,
    )
    with_reference = kl_control.kl_coef > 0
    if not with_reference and (kl or kl_target or ref_ema is not None):
        raise UserError(
            "--kl, --kl_target, --ref_ema: have no effect with --kl_coef 0, which needs no reference"
        )
    earlier = Earlier.find(settings, [actor_save_dir, critic_save_dir], parallel)
    stage = load_roles(opened, settings, parallel, number_type, with_reference)

    with RunLog(logs, "ppo_train", settings, parallel.rank) as log:
        actor, critic = opened.actor, opened.critic
        for message in warnings:
            log.warning(f"{message} and are left out")
        changed = changed_rewards(states[0], ppo_settings)
        if changed:
            log.warning(f"the run that left {actor_ckpt_dir} had other rewards: {changed}")
        if opened.moments:
            log.info(
                f"the verifier's scores are centred by {opened.moments[0]:.4f} and divided by {opened.moments[1]:.4f}"
            )
        if opened.translates:
            log.info("the verifier has another tokenizer and reads the texts")
        if offload and parallel.device.type == "cpu":
            log.warning(
                "--offload: on the CPU the device's memory is the host's: roles are moved, and nothing is saved"
            )
        log.info(
            f"{len(prompts)} prompts; ranks: {parallel.mp_size} model-parallel × {parallel.dp_size} data-parallel; "
            f"advantages: {advantage}; kl_coef {kl_control.kl_coef}{'' if with_reference else ': no reference'}"
        )
        limits = rollout_batch_size, max_seq_len, kv_cache_gb
        policy = stage.roles["policy"].model
        if rollout_model_parallel_size in (None, parallel.mp_size):
            engine = Engine(policy, parallel, *limits)
        else:
            engine = RelaidEngine(policy, parallel, rollout_model_parallel_size, *limits)
        per_step = ptx_batch_size or max(1, max_buffer_size // mini_batches)
        ppo = PPO(
            stage,
            make_rewards(opened, settings, stage, parallel, rule),
            engine,
            sampling,
            actor.tokenizer.stop_ids,
            kl_control,
            ppo_settings,
            parallel,
            PretrainingMix(mix, per_step, ppo_settings, parallel.device) if mix else None,
        )
        ppo.restore(*states)
        if log_samples:
            ppo.watch.append(SampleTexts(log_samples, actor.tokenizer, log))
        if dump_rollouts is not None:
            ppo.watch.append(RolloutDump(dump_rollouts, actor.tokenizer, parallel))

        def save(role: str, folder: str, base: Model) -> None:
            one, tokenizer, state = stage.roles[role], base.tokenizer, ppo.state()[role]
            with stage.at_work(role):
                save_model(
                    one.model,
                    one.parallel,
                    folder,
                    base.checkpoint,
                    tokenizer.path,
                    tokenizer.borrowed_template,
                    {STATE_FILE: state} if state else None,
                )

        best = KeepBest(keep_best, lambda: save("policy", best_dir, actor), log)

        def evaluate(at: str, number: int) -> None:
            with stage.at_work("policy"):
                metrics = evaluation.run(
                    at, number, policy, actor.tokenizer, parallel, log, settings
                )
            best.consider(at, number, metrics)

        parts = {"best": best.part, **ppo.parts()}
        trained = {
            role.name: (role.model, role.optimizer)
            for role in stage.roles.values()
            if role.optimizer
        }
        saving = Saving(
            earlier,
            settings,
            trained,
            parallel,
            log,
            parts,
            ppo.tensors(),
            partial(stage.at_work, training=True),
        )
        fit(ppo, prompts, plan, log, evaluate, saving)
        save("policy", actor_save_dir, actor)
        log.info(f"saved the policy to {actor_save_dir}")
        if critic:
            save("value", critic_save_dir, critic)
            log.info(f"saved the value model to {critic_save_dir}")
        saving.finish()
    stop()


if __name__ == "__main__":
    run(main)
