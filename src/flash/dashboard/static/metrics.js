// What metrics are called and in which order they are shown. What is not named here comes last, under its own name.

const FIRST = ["reward", "loss", "eval_loss", "success", "kl", "entropy", "length", "truncated", "equal_groups", "learning_rate", "grad_norm", "tokens_per_s", "memory_gb", "seconds"];
const TITLES = {
  reward: "Reward", loss: "Loss", eval_loss: "Held-out loss", success: "Success", kl: "KL to the base", entropy: "Entropy",
  length: "Answer length, tokens", truncated: "Truncated answers", equal_groups: "Groups without a gradient", learning_rate: "Learning rate",
  grad_norm: "Gradient norm", tokens_per_s: "Tokens a second", memory_gb: "Memory, GB", seconds: "Seconds a step", reward_std: "Spread of rewards", epoch: "Epoch", tokens: "Tokens", turns: "Turns", clipped: "Clipped ratios", mismatch_kl: "KL of sampler and trainer",
  groups_dropped: "Groups dropped", prompts_dropped: "Prompts dropped",
};

export function titleOf(name) {
  return Object.hasOwn(TITLES, name) ? TITLES[name] : name;
}

export function inOrder(a, b) {
  return rank(a) - rank(b) || a.localeCompare(b);
}

function rank(name) {
  const at = FIRST.indexOf(name);
  if (at >= 0) return at;
  return name.startsWith("env/") ? 50 : 100;
}
