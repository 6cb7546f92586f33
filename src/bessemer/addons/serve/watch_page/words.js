// The live page in English and Chinese. The server's English texts (alarms, plot names, what is wrong with a directory)
// are looked up here by their words; names of runs, stages, files and metrics stay as they are.

import { browserLanguage, speech } from "./speech.js";

const KEPT = "bessemer.watch.language";
const MOST = 1000; // most characters of a sentence that is looked up

const ZH = {
  // index.html
  "Sections": "页面导航", "Curves": "曲线", "Experts": "专家", "Rollouts": "采样回答", "Time": "时间", "Chat": "对话",
  "Runs": "运行", "Stage": "阶段", "Alarms": "告警", "over": "横轴", "steps": "步数", "tokens": "词元", "minutes": "分钟",
  "Choose curves": "选择曲线", "Expert load": "专家负载", "idle": "空闲", "twice its share or more": "均等份额的两倍及以上",
  "Noisy curves: faint as measured, bold smoothed. Drag over a stretch or press + to zoom in, − to see all; arrow keys read values.":
    "噪声大的曲线：浅色为实测，粗线为平滑后。拖选一段或按 + 放大，按 − 显示全部；方向键读取数值。",
  "Each row is an expert; time runs to the right.": "每行是一个专家，横轴为时间。",
  "Newest rollouts": "最新的采样回答", "Planned against measured time": "预计用时与实测用时",
  "Planned: by rates measured on this machine just before the run, or guessed where nothing was measured. Measured: restarts included.":
    "预计：按运行前在本机实测的速度估算，未实测处为粗略估算。实测：含各次重启的用时。",
  "Talk to the newest model": "与最新模型对话",
  // runs, stages, times
  "running": "运行中", "finished": "已完成", "stopped": "已停止", "not started": "未开始", "no stage has started": "尚无阶段开始",
  "reading": "读取中", ", step {n}": "，第 {n} 步", ", last line {time} ago": "，最后一条记录在 {time}前",
  ", about {time} left": "，约剩 {time}",
  "{s} s": "{s} 秒", "{m} min {s} s": "{m} 分 {s} 秒", "{h} h {m} min": "{h} 小时 {m} 分",
  "run": "运行", "stage": "阶段", "planned": "预计", "measured": "实测", "of the plan": "实测/预计", "all": "合计",
  "Times of the stages": "各阶段用时", " or ": " 或 ",
  // plots
  "show all": "显示全部", "no values here": "此处无数据", "No curve is chosen.": "未选择曲线。",
  "No stage has written a metric yet.": "尚无阶段写出指标。",
  "all have an equal share": "各专家负载均等",
  "expert {a} has {most}× its share, expert {b} {least}×": "专家 {a} 的负载为均等份额的 {most} 倍，专家 {b} 为 {least} 倍",
  "{n} experts, steps {first} to {last}. At the end {end}.": "{n} 个专家，第 {first} 至 {last} 步。最后{end}。",
  "step {step}, expert {expert}: {times}× its share": "第 {step} 步，专家 {expert}：均等份额的 {times} 倍",
  // rollouts
  "This stage has no rollouts.": "此阶段没有采样回答。", "step {n}": "第 {n} 步", "reward {n}": "奖励 {n}", "{n} tokens": "{n} 个词元",
  "not well-formed": "格式不合要求", "✓ right": "✓ 正确", "✗ wrong": "✗ 错误", "Prompt": "题目", "Answer": "回答", "prompt": "题目",
  "answer": "回答",
  // alarms
  "since step {n}": "自第 {n} 步起", "at step {n}, over now": "第 {n} 步触发，现已解除",
  "Likely cause: {cause}. What to do: {advice}.": "可能的原因：{cause}。建议：{advice}。", "{sentence}.": "{sentence}。", ", ": "，",
  "The server does not answer. This page keeps trying and resumes when it does.": "服务器没有响应。本页会不断重试，恢复后继续显示。",
};

// What the server says. A {place} stands for one word; {what}, {name} and {path} stand for any text.
const SERVER = {
  // names of plots and their units
  "Training loss": "训练损失", "nats per token": "nat/词元", "Validation": "验证", "bits per byte": "比特/字节",
  "Expert imbalance": "专家负载不均衡", "MaxVio: fullest expert over the mean, minus 1": "MaxVio：最高专家负载与均值之比减 1",
  "Balance loss": "负载均衡损失", "Gradient norm": "梯度范数", "before clipping": "裁剪前", "Learning rate": "学习率",
  "Speed": "速度", "tokens per second": "词元/秒", "GPU": "GPU", "share of the peak in BF16 (MFU)": "占 BF16 峰值算力的比例（MFU）",
  "Accuracy": "准确率", "share of rollouts": "占采样回答的比例", "Held-out problems": "留出题", "share solved": "答对比例",
  "Held-out, task by task": "各任务的留出题", "pass@1": "pass@1", "Length": "长度", "tokens per answer": "每个回答的词元数",
  "Reflection": "反思", "the paper's ten words, such as wait, per answer": "每个回答中论文所列十个词（如 wait）的次数",
  "Word by word": "逐词统计", "per answer, those used most": "每个回答中的次数，只列最常用的", "Tries": "尝试次数",
  "lines of thought per answer, whatever their words": "每个回答的思考行数，与用词无关", "Thinking": "思考",
  "share of rollouts that think": "有思考过程的回答比例", "Language": "语言",
  "share of words in the problem's language": "与题目语言一致的词的比例", "Inside the trace": "解题过程内部", "share of cases": "占相应情形的比例",
  "Reward": "奖励", "mean": "平均值", "credit earned": "得分", "correct as in training": "按训练标准正确",
  "pass@1 in any form": "不限格式的 pass@1", "Reward model": "奖励模型", "mean score of general answers": "通用回答的平均分",
  "Entropy": "熵", "Lost signal": "损失的训练信号", "share": "比例", "Pass rates": "通过率",
  "moving estimate by task, difficulty and language": "按任务、难度和语言的滑动估计", "Sampler gap": "训推差异",
  "trainer against sampler, nats per token": "训练端与采样端之差，nat/词元", "Importance weights": "重要性权重",
  "of tokens, trainer over sampler": "逐词元，训练端与采样端的概率之比", "Staleness": "陈旧度",
  "steps between sampling and updating": "采样与更新相隔的步数", "Routing": "路由",
  "share of tokens routed differently by the trainer": "训练端路由不同的词元比例", "Sampling mask": "采样掩码",
  "Sampler mismatch": "训推不一致", "share of tokens whose probability differs by more than a factor of 2": "概率相差两倍以上的词元占比",
  "Drafts": "草稿", "loss of the MTP modules, nats per token": "MTP 模块的损失，nat/词元",
  "tokens that top-p leaves, mean": "top-p 保留的平均词元数", "KL to the reference": "与参考模型的 KL 散度",
  // names of lines
  "next token": "下一个词元", "token after (MTP 1)": "后第二个词元（MTP 1）", "two after (MTP 2)": "后第三个词元（MTP 2）",
  "three after (MTP 3)": "后第四个词元（MTP 3）", "correct": "正确", "well-formed": "格式正确", "in training": "训练题",
  "held-out problems": "留出题", "groups without contrast": "奖励无差异的组", "answers cut off": "被截断的回答", "tokens clipped": "被裁剪的词元",
  "distance of log-probabilities": "对数概率之差", "KL": "KL", "mean weight": "平均权重",
  "share cut": "被截断的比例", "steps computed right": "计算正确的步骤", "tries with the given numbers": "数字使用正确的尝试",
  "hits recognised as hits": "命中且被认出", "misses taken for hits": "未命中却被当成命中", "repeated tries": "重复的尝试", "returns to an earlier try": "回到先前的尝试",
  "answers that gave up": "中途放弃的回答", "layer {n}": "第 {n} 层",
  // alarms: titles
  "format hacking": "刷格式奖励", "length collapse": "长度坍缩", "no growth": "没有增长", "thinking stops": "不再思考", "collapse": "训练崩溃",
  "entropy collapse": "熵坍缩", "entropy explosion": "熵爆炸", "groups too hard": "题目过难", "groups too easy": "题目过易",
  "never ending": "回答不收尾", "sampler mismatch": "训推不一致", "kl runaway": "KL 失控", "reward model hacking": "钻奖励模型的空子",
  "language mixing": "语言混杂", "not finite": "出现非有限值", "learning rate zero": "学习率为零",
  "frozen reference": "参考模型形同虚设", "wrong kl sign": "KL 符号有误", "steps too large": "更新步长过大", "no contrast": "组内奖励无差异", "negative kl": "KL 为负",
  // alarms: what was observed, why, and what to do
  "well-formed answers went from {a} to {b}, correct ones from {c} to {d}": "格式正确的回答从 {a} 变为 {b}，答对的从 {c} 变为 {d}",
  "the form is rewarded and the problems are out of reach, so the form is all there is to learn":
    "格式有奖励，而题目超出模型能力，能学到的只有格式",
  "lower the weight of the term format, choose easier problems, or start from a better base": "降低 format 项的权重，改用更容易的题目，或换更好的基座模型",
  "answers shrank from {a} to {b} tokens and accuracy did not rise ({c} to {d})": "回答从 {a} 个词元缩短到 {b} 个，准确率没有提高（{c} 到 {d}）",
  "answers have {a} tokens ({b} at first), {c} are right ({d})": "回答有 {a} 个词元（起初 {b} 个），{c} 正确（起初 {d}）",
  "the first rollouts are like those of the recipe zero-long, whose answers grow: steps are too small": "最初的样本与回答会增长的配方 zero-long 相似：步长太小",
  "an answer has {a} tries at first (recipe zero-long: 2.5): the prompt draws out no search":
    "起初每个回答只尝试 {a} 次（配方 zero-long 为 2.5 次）：在这种提示下基座模型不搜索",
  "{a} of the groups have no contrast at first (recipe zero-long: 50%), and teach nothing": "起初 {a} 的组内奖励无差异（配方 zero-long 为 50%），学不到东西",
  "{a} of the answers are well-formed at first (recipe zero-long: 90%)": "起初只有 {a} 的回答格式正确（配方 zero-long 为 90%）",
  "entropy is {a} nats per token at first (recipe zero-long: 0.28), so samples are alike": "起初熵为每词元 {a} 奈特（配方 zero-long 为 0.28），样本彼此雷同",
  "pre-train on pages with several tries and on dialogues in the prompt's manner, or choose easier problems":
    "用包含多次尝试的文本和与提示形式相近的对话做预训练，或改用更容易的题目",
  "raise lr or rollouts": "提高 lr 或增加 rollouts",
  "thinking is not worth it: it goes wrong too often, or the normalisation favours short answers":
    "思考得不偿失：出错太多，或归一化方式偏向短回答",
  'pre-train longer on worked problems, lower the weight of the term format, or use normalise = "token"':
    '增加带解题过程的预训练，降低 format 项的权重，或设 normalise = "token"',
  "{a} of the answers think, {b} did": "{a} 的回答有思考过程，此前为 {b}",
  "answering at once is as good, since the thoughts do not lead to right answers": "直接作答效果一样，因为思考并不能得出正确答案",
  "pre-train longer on worked problems, or choose problems that cannot be guessed":
    "增加带解题过程的预训练，或改用无法猜出答案的题目",
  "accuracy fell from {a} to {b}": "准确率从 {a} 降到 {b}",
  "steps too large (a learning rate too high for so few samples, too many updates on one rollout), or a reward for something other than right answers":
    "更新步长过大（样本少而学习率过高，或同一批采样上更新次数过多），或奖励的并不是正确答案",
  "continue from an earlier checkpoint with a lower lr, fewer updates_per_rollout or more prompts_per_rollout":
    "从较早的检查点继续，降低 lr，减小 updates_per_rollout 或增大 prompts_per_rollout",
  "entropy fell from {a} to {b} nats per token": "熵从 {a} 降到 {b} nat/词元",
  "the policy has become certain, so the samples of a group are alike and nothing new is tried":
    "策略过于确定，同组样本彼此雷同，不再探索",
  "raise loss.clip_high, lower lr, or refresh the problems": "提高 loss.clip_high，降低 lr，或更换题目",
  "entropy rose from {a} to {b} nats per token": "熵从 {a} 升到 {b} nat/词元",
  "the policy dissolves into noise: steps too large, or a reward that does not depend on the answer":
    "策略退化成噪声：更新步长过大，或奖励与回答无关",
  "continue from an earlier checkpoint with a lower lr or a higher kl.weight, and look at the rollouts":
    "从较早的检查点继续，降低 lr 或提高 kl.weight，并检查采样回答",
  "{a} of the groups have no contrast, {b} of the answers are right": "{a} 的组内奖励没有差异，{b} 的回答正确",
  "the problems are too hard: nearly every group is all wrong": "题目太难：几乎每组全错",
  "choose easier problems, take more samples, or start from a better base": "改用更容易的题目，增加采样数，或换更好的基座模型",
  "the problems are too easy: nearly every group is all right": "题目太容易：几乎每组全对",
  "choose harder problems, or stop here": "改用更难的题目，或就此停止",
  "{a} of the answers are cut off at the cap": "{a} 的回答达到长度上限而被截断",
  "{a} of the answers are cut off at the cap, and accuracy falls": "{a} 的回答达到长度上限而被截断，且准确率下降",
  "the cap is too low for what the policy has learnt to write, or it no longer ends its answers":
    "长度上限容不下策略学会的写法，或策略不再结束回答",
  "raise max_new_tokens if the rollouts still make progress at the cap; otherwise lower lr, or penalise answers near it by a term such as overlong of examples/plugins":
    "若回答到达上限时仍有进展，提高 max_new_tokens；否则降低 lr，或用 examples/plugins 中的 overlong 一类的奖励项惩罚接近上限的回答",
  "trainer and sampler disagree by {a} nats per token, and about {b} of the tokens by more than a factor of 2":
    "训练端与采样端相差 {a} nat/词元，约 {b} 的词元概率相差两倍以上",
  "the sampler's model is not the trainer's: stale weights, another precision, routing that differs, or another temperature":
    "采样端的模型与训练端不一致：权重过期，或精度、路由、温度不同",
  "sample with the trainer's precision and weights, replay the sampler's routing, or correct with truncated importance weights":
    "用训练端的精度和权重采样，回放采样端的路由，或用截断的重要性权重修正",
  "the policy is {a} nats per token from its reference": "策略与参考模型相差 {a} nat/词元",
  "steps too large, or drift into a language of its own that the reward does not see": "更新步长过大，或漂移成奖励察觉不到的自造语言",
  "lower lr, raise kl.weight, or reward readability (the terms format and language)": "降低 lr，提高 kl.weight，或奖励可读性（format 项和 language 项）",
  "the learning rate was 0 in all {a} records": "全部 {a} 条记录中学习率都是 0",
  "the schedule never leaves 0, or its number of steps is wrong": "学习率计划始终停在 0，或其步数设错",
  "set lr, and look at its warm-up and at the number of steps it is planned for": "设置 lr，并检查其预热与计划步数",
  "KL stays at {a} nats per token while gradients are {b}": "KL 一直是 {a} nat/词元，而梯度范数为 {b}",
  "the policy is compared with itself: the reference is the same object, or is updated after every step":
    "策略在与自己比较：参考模型就是同一个对象，或每步之后都被更新",
  "compare the reference's weights with those of the first checkpoint, and look at how often it is updated":
    "将参考模型的权重与第一个检查点比较，并检查它多久更新一次",
  "look at the sign of the weight, and at which of policy and reference is subtracted from which":
    "检查权重的符号，以及策略与参考模型谁减谁",
  "look at which of policy and reference is subtracted from which, and at the sampler's temperature":
    "检查策略与参考模型谁减谁，以及采样端的温度",
  "the weight of KL is {a}": "KL 的权重为 {a}",
  "the loss pays for distance from the reference": "损失函数在奖励远离参考模型",
  "KL is negative, {a} nats per token": "KL 为负，{a} nat/词元",
  "reference and policy are exchanged, or the samples are not the policy's (another temperature, old weights)":
    "参考模型与策略颠倒，或样本并非来自当前策略（温度不同、权重过期）",
  "the loss is {a} where KL is {b} nats per token, as with a weight of {c}": "KL 为 {b} nat/词元时损失为 {a}，相当于权重 {c}",
  "not a finite number in the last {a} records: {b}": "最近 {a} 条记录中出现非有限值：{b}",
  "an overflow, a division by a count of 0, or a step after which the weights were not finite":
    "数值溢出、除以为 0 的计数，或某一步之后权重已非有限值",
  "find the first such step, and continue from a checkpoint before it with a lower lr or another precision":
    "找到首个出错的步骤，从其之前的检查点继续，降低 lr 或改用其他精度",
  "{a} of the tokens are clipped": "{a} 的词元被裁剪",
  "the policy has left the one that sampled: a learning rate too high, or too many updates on one rollout":
    "策略已偏离采样时的策略：学习率过高，或同一批采样上更新次数过多",
  "lower lr, or take fewer updates_per_rollout": "降低 lr，或减小 updates_per_rollout",
  "the gradient's norm went from {a} to {b}": "梯度范数从 {a} 变为 {b}",
  "a learning rate too high, or a term of the loss without a bound": "学习率过高，或损失中有无界的项",
  "lower lr, or clip the gradient": "降低 lr，或裁剪梯度",
  "trainer and sampler are {a} nats of KL per token apart": "训练端与采样端的 KL 为 {a} nat/词元",
  "in {a} of the groups all samples have the same reward": "{a} 的组内所有样本奖励相同",
  "the problems are too hard, or too easy, or the reward does not depend on the answer": "题目太难或太容易，或奖励与回答无关",
  "look at the rewards of one group; choose problems that are solved now and then": "查看一组样本的奖励；改用偶尔能解出的题目",
  "answers shrank from {a} to {b} tokens and the reward did not rise ({c} to {d})": "回答从 {a} 个词元缩短到 {b} 个，奖励没有提高（{c} 到 {d}）",
  "the reward fell from {a} to {b}, and its standard deviation over samples was {c}": "奖励从 {a} 降到 {b}，其样本间标准差为 {c}",
  "the reward model's score rose from {a} to {b} while {what} fell from {c} to {d}": "奖励模型的分数从 {a} 升到 {b}，而{what}从 {c} 降到 {d}",
  "held-out accuracy": "留出题准确率", "accuracy": "准确率",
  "the policy pleases the reward model instead of solving problems": "策略在迎合奖励模型，而不是解题",
  "raise general.start (R1: only the last 400 of 1,700 steps have such prompts), or lower general.prompts":
    "提高 general.start（R1：只有 1,700 步中的最后 400 步有这类题），或降低 general.prompts",
  "{a} of the words of a thought are in the problem's language, {b} at the start": "思考过程中 {a} 的词与题目语言一致，开始时为 {b}",
  "only the answer is rewarded, and mixing costs nothing": "只奖励答案，混用语言没有代价",
  "add the term language to reward (R1's first RL stage: weight 1)": "在 reward 中加入 language 一项（R1 的第一个 RL 阶段：权重 1）",
  "{name} was not finite once at step {n}": "{name} 在第 {n} 步出现一次非有限值",
  "{name} was not finite {k} times, last at step {n}": "{name} 出现 {k} 次非有限值，最近一次在第 {n} 步",
  // what is wrong with a directory
  "{path} cannot be read now ({why}); what this page had stays until it is back": "{path} 暂时无法读取（{why}）；恢复之前，本页保留已有内容",
  "the disk of {path} has not answered for {n} seconds": "{path} 所在的磁盘已有 {n} 秒没有响应",
  "recipe.toml cannot be read ({why})": "无法读取 recipe.toml（{why}）",
  "metrics.jsonl has a damaged line, which is left out": "metrics.jsonl 有一行损坏，已忽略",
  "metrics.jsonl has {n} damaged lines, which are left out": "metrics.jsonl 有 {n} 行损坏，已忽略",
};

const ANY = new Set(["what", "name", "path", "why"]);
const PATTERNS = Object.keys(SERVER).filter((key) => key.includes("{")).map((key) => {
  const places = [];
  const plain = (text) => text.replace(/[.*+?^${}()|[\]\\]/g, "\\$&");
  const parts = key.split(/\{(\w+)\}/).map((part, i) => {
    if (i % 2 === 0) return plain(part);
    places.push(part);
    return ANY.has(part) ? "([^]+)" : "(\\S+)";
  });
  return { key, places, pattern: new RegExp(`^${parts.join("")}$`) };
});

function kept() {
  try {
    const language = localStorage.getItem(KEPT);
    return ["en", "zh"].includes(language) ? language : null;
  } catch {
    return null;
  }
}

export const language = kept() ?? browserLanguage();
export const { t, translatePage } = speech({ ...ZH, ...SERVER }, language);

// What the server said, in the page's language if it is a known sentence or name.
export function told(text) {
  if (language === "en" || Object.hasOwn(SERVER, text)) return t(text);
  if (text.length > MOST) return text;
  for (const { key, places, pattern } of PATTERNS) {
    const found = pattern.exec(text);
    if (found) return t(key, Object.fromEntries(places.map((place, i) => [place, place === "what" ? told(found[i + 1]) : found[i + 1]])));
  }
  return text;
}

// Switches the page to the other language.
export function switchLanguage() {
  try {
    localStorage.setItem(KEPT, language === "zh" ? "en" : "zh");
  } catch {
    return; // a browser without storage keeps its own language
  }
  location.reload();
}
