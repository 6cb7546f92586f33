// The live page in English and Chinese. The server's English texts (alarms, plot names, what is wrong with a directory)
// are looked up here by their words; names of runs, stages, files and metrics stay as they are.

import { browserLanguage, speech } from "./speech.js";

const KEPT = "bessemer.watch.language";
const MOST = 1000; // most characters of a sentence that is looked up

const ZH = {
  // index.html
  "Sections": "栏目", "Curves": "曲线", "Experts": "专家", "Rollouts": "采样回答", "Time": "时间", "Chat": "对话",
  "Runs": "运行", "Stage": "阶段", "Alarms": "警报", "over": "横轴", "steps": "步数", "tokens": "词元", "minutes": "分钟",
  "Choose curves": "选择曲线", "Expert load": "专家负载", "idle": "空闲", "twice its share and more": "均等份额的两倍及以上",
  "Noisy curves: faint as measured, bold smoothed. Drag over a stretch, or press + and −, to look closer; arrow keys read values.":
    "抖动的曲线：细线为实测，粗线为平滑后。拖选一段或按 + 和 − 放大查看；方向键读取数值。",
  "Each row is an expert, time runs to the right.": "每行是一个专家，时间向右。",
  "Newest rollouts": "最新的采样回答", "Planned against measured time": "计划时间与实测时间",
  "Planned: rough, made for two CPU cores when the run was started. Measured: restarts included.":
    "计划：启动时按两个 CPU 核心粗略估计。实测：包含重启。",
  "Talk to the newest model": "与最新的模型对话",
  // runs, stages, times
  "running": "进行中", "finished": "已完成", "stopped": "已停止", "not begun": "未开始", "no stage has begun": "还没有阶段开始",
  "reading": "读取中", ", step {n}": "，第 {n} 步", ", last line {time} ago": "，最后一行在 {time}前",
  "{s} s": "{s} 秒", "{m} min {s} s": "{m} 分 {s} 秒", "{h} h {m} min": "{h} 小时 {m} 分",
  "run": "运行", "stage": "阶段", "planned": "计划", "measured": "实测", "of the plan": "占计划", "all": "合计",
  "Times of the stages": "各阶段的时间", " or ": " 或 ",
  // plots
  "show all": "显示全部", "no values here": "此处没有数值", "No curve is chosen.": "没有选择曲线。",
  "No stage has written a metric yet.": "还没有阶段写出指标。",
  "all have an even share": "各专家负载均等",
  "expert {a} has {most} its share, expert {b} {least}": "专家 {a} 为均等份额的 {most}，专家 {b} 为 {least}",
  "{n} experts, steps {first} to {last}. At the end {end}.": "{n} 个专家，第 {first} 至 {last} 步。最后{end}。",
  "step {step}, expert {expert}: {times} its share": "第 {step} 步，专家 {expert}：均等份额的 {times}",
  // rollouts
  "This stage has no rollouts.": "这个阶段没有采样回答。", "step {n}": "第 {n} 步", "reward {n}": "奖励 {n}", "{n} tokens": "{n} 个词元",
  "not well-formed": "格式不对", "✓ right": "✓ 正确", "✗ wrong": "✗ 错误", "Prompt": "题目", "Answer": "回答", "prompt": "题目",
  "answer": "回答",
  // alarms
  "since step {n}": "自第 {n} 步起", "at step {n}, over now": "在第 {n} 步，现已解除",
  "Likely cause: {cause}. What to do: {advice}.": "可能的原因：{cause}。怎么办：{advice}。", "{sentence}.": "{sentence}。",
  "The server does not answer. This page asks again and goes on when it does.": "服务器没有应答。本页会继续询问，恢复后接着显示。",
};

// What the server says. A {place} stands for one word; {what}, {name} and {path} stand for any text.
const SERVER = {
  // names of plots and their units
  "Training loss": "训练损失", "nats per token": "每词元 nat", "Validation": "验证", "bits per byte": "每字节比特",
  "Expert imbalance": "专家不均衡", "MaxVio: fullest expert over the mean, minus 1": "MaxVio：最满的专家除以均值，减 1",
  "Balance loss": "均衡损失", "Gradient norm": "梯度范数", "before clipping": "裁剪之前", "Learning rate": "学习率",
  "Speed": "速度", "tokens per second": "每秒词元", "GPU": "GPU", "share of the peak in BF16 (MFU)": "占 BF16 峰值的比例（MFU）",
  "Accuracy": "正确率", "share of rollouts": "占采样回答的比例", "Held-out problems": "留出题", "share solved": "答对的比例",
  "Held-out, task by task": "各任务的留出题", "pass@1": "pass@1", "Length": "长度", "tokens per answer": "每个回答的词元",
  "Reflection": "反思", "the paper's ten words, such as wait, per answer": "论文的十个词（如 wait），每个回答",
  "Word by word": "逐词", "per answer, those used most": "每个回答，最常用的", "Tries": "尝试",
  "lines of thought per answer, whatever their words": "每个回答的思路数，不论用词", "Thinking": "思考",
  "share of rollouts that think": "有思考的回答的比例", "Language": "语言",
  "share of words in the problem's language": "与题目同一语言的词的比例", "Inside the trace": "搜索过程内部", "share of cases": "情形的比例",
  "Reward": "奖励", "mean of a rollout": "一次采样的均值", "Reward model": "奖励模型", "mean score of general answers": "一般回答的平均分",
  "Entropy": "熵", "Lost signal": "丢失的信号", "share": "比例", "Difficulty filter": "难度筛选",
  "share of candidates, of problems asked": "占候选题、占所问题目的比例", "Pass rates": "通过率",
  "moving estimate by task, difficulty and language": "按任务、难度和语言的滑动估计", "Sampler gap": "采样器差距",
  "trainer against sampler, nats per token": "训练器对采样器，每词元 nat", "Importance weights": "重要性权重",
  "of tokens, trainer over sampler": "词元的，训练器除以采样器", "Staleness": "陈旧程度",
  "steps between sampling and updating": "采样与更新之间的步数", "Routing": "路由",
  "share of tokens routed differently by the trainer": "训练器路由不同的词元比例", "Sampling mask": "采样掩码",
  "tokens that top-p leaves, mean": "top-p 留下的词元数，均值", "KL to the reference": "与参考模型的 KL",
  // names of lines
  "next token": "下一个词元", "token after (MTP 1)": "再下一个（MTP 1）", "two after (MTP 2)": "其后第二个（MTP 2）",
  "three after (MTP 3)": "其后第三个（MTP 3）", "correct": "正确", "well-formed": "格式正确", "in training": "训练中",
  "held-out problems": "留出题", "groups without contrast": "没有差别的组", "answers cut off": "被截断的回答", "tokens clipped": "被裁剪的词元",
  "left out": "略去", "asked anyway": "仍然询问", "distance of log-probabilities": "对数概率的差距", "KL": "KL", "mean weight": "平均权重",
  "share cut": "被截的比例", "steps computed right": "算对的步骤", "tries with the given numbers": "用了所给数字的尝试",
  "hits recognised as hits": "命中且认出", "misses taken for hits": "未命中却当作命中", "repeated tries": "重复的尝试",
  "answers that gave up": "放弃的回答", "layer {n}": "第 {n} 层",
  // alarms: titles
  "format hacking": "格式投机", "length collapse": "长度塌缩", "thinking stops": "停止思考", "collapse": "崩溃",
  "entropy collapse": "熵塌缩", "entropy explosion": "熵爆炸", "groups too hard": "题组太难", "groups too easy": "题组太易",
  "never ending": "没完没了", "sampler mismatch": "采样器不一致", "kl runaway": "KL 失控", "reward model hacking": "奖励模型投机",
  "language mixing": "语言混杂", "not finite": "非有限值",
  // alarms: what was observed, why, and what to do
  "well-formed answers went from {a} to {b}, correct ones from {c} to {d}": "格式正确的回答从 {a} 变为 {b}，答对的从 {c} 变为 {d}",
  "the form is rewarded and the problems are out of reach, so the form is all there is to learn":
    "格式有奖励而题目做不出来，能学的只有格式",
  "lower format_reward, choose easier problems, or start from a better base": "降低 format_reward，选更容易的题目，或从更好的基座开始",
  "answers shrank from {a} to {b} tokens and accuracy did not rise ({c} to {d})": "回答从 {a} 个词元缩短到 {b} 个，正确率没有提高（{c} 到 {d}）",
  "thinking is not worth it: it goes wrong too often, or the normalisation favours short answers":
    "思考不划算：太容易出错，或归一化偏向短回答",
  'pre-train longer on worked problems, lower format_reward, or use normalise = "token"':
    '在有解题过程的题目上预训练更久，降低 format_reward，或使用 normalise = "token"',
  "{a} of the answers think, {b} did": "{a} 的回答有思考，之前是 {b}",
  "answering at once is as good, since the thoughts do not lead to right answers": "直接作答同样好，因为思考并不带来正确答案",
  "pre-train longer on worked problems, or choose problems that cannot be guessed":
    "在有解题过程的题目上预训练更久，或选猜不出答案的题目",
  "accuracy fell from {a} to {b}": "正确率从 {a} 降到 {b}",
  "steps too large (a learning rate too high for so few samples, too many updates on one rollout), or a reward for something other than right answers":
    "步子太大（样本这么少而学习率过高，或一次采样上更新太多次），或奖励给的不是正确答案",
  "continue from an earlier checkpoint with a lower lr, fewer updates_per_rollout or more prompts_per_rollout":
    "从较早的检查点继续，降低 lr，减少 updates_per_rollout 或增加 prompts_per_rollout",
  "entropy fell from {a} to {b} nats per token": "熵从每词元 {a} nat 降到 {b}",
  "the policy has become certain, so the samples of a group are alike and nothing new is tried":
    "策略变得确定，同组的样本彼此相似，不再尝试新的东西",
  "raise clip_high, lower lr, or refresh the problems": "提高 clip_high，降低 lr，或更换题目",
  "entropy rose from {a} to {b} nats per token": "熵从每词元 {a} nat 升到 {b}",
  "the policy dissolves into noise: steps too large, or a reward that does not depend on the answer":
    "策略退化为噪声：步子太大，或奖励与回答无关",
  "continue from an earlier checkpoint with a lower lr or a higher kl, and look at the rollouts":
    "从较早的检查点继续，降低 lr 或提高 kl，并查看采样回答",
  "{a} of the groups have no contrast, {b} of the answers are right": "{a} 的组没有差别，{b} 的回答正确",
  "the problems are too hard: nearly every group is all wrong": "题目太难：几乎每组全错",
  "choose easier problems, take more samples, or start from a better base": "选更容易的题目，多采样，或从更好的基座开始",
  "the problems are too easy: nearly every group is all right": "题目太易：几乎每组全对",
  "choose harder problems, or stop here": "选更难的题目，或到此为止",
  "{a} of the answers are cut off at the cap": "{a} 的回答在长度上限处被截断",
  "{a} of the answers are cut off at the cap, and accuracy falls": "{a} 的回答在长度上限处被截断，正确率下降",
  "the cap is too low for what the policy has learnt to write, or it no longer ends its answers":
    "对策略学会写的内容来说上限太低，或它不再结束回答",
  "raise max_new_tokens if the rollouts still make progress at the cap; otherwise lower lr, or set overlong to penalise answers near it":
    "若回答到上限处仍有进展，提高 max_new_tokens；否则降低 lr，或设置 overlong 惩罚接近上限的回答",
  "trainer and sampler disagree by {a} nats per token": "训练器与采样器每词元相差 {a} nat",
  "the sampler's model is not the trainer's: stale weights, another precision, routing that differs, or another temperature":
    "采样器与训练器不是同一个模型：权重陈旧、精度不同、路由不同或温度不同",
  "sample with the trainer's precision and weights, replay the sampler's routing, or correct with truncated importance weights":
    "用训练器的精度和权重采样，重放采样器的路由，或用截断的重要性权重修正",
  "the policy is {a} nats per token from its reference": "策略与参考模型每词元相距 {a} nat",
  "steps too large, or drift into a language of its own that the reward does not see": "步子太大，或漂移到奖励看不见的自造语言",
  "lower lr, raise kl, or reward readability (format_reward, language_reward)": "降低 lr，提高 kl，或奖励可读性（format_reward、language_reward）",
  "the reward model's score rose from {a} to {b} while {what} fell from {c} to {d}": "奖励模型的分数从 {a} 升到 {b}，而{what}从 {c} 降到 {d}",
  "held-out accuracy": "留出题正确率", "accuracy": "正确率",
  "the policy pleases the reward model instead of solving problems": "策略在讨好奖励模型，而不是解题",
  "end the preference reward earlier (R1: the last 400 of 1,700 steps) or lower preference_reward":
    "更早结束偏好奖励（R1：1,700 步中的最后 400 步），或降低 preference_reward",
  "{a} of the words of a thought are in the problem's language, {b} at the start": "思考中 {a} 的词与题目同一语言，开始时是 {b}",
  "only the answer is rewarded, and mixing costs nothing": "只有答案有奖励，混用语言没有代价",
  "set language_reward (R1's first RL stage: 1)": "设置 language_reward（R1 的第一个强化学习阶段：1）",
  "{name} was not finite once at step {n}": "{name} 在第 {n} 步一次不是有限数",
  "{name} was not finite {k} times, last at step {n}": "{name} 有 {k} 次不是有限数，最近在第 {n} 步",
  // what is wrong with a directory
  "{path} cannot be read now ({why}); what this page had stays until it is back": "{path} 现在无法读取（{why}）；恢复之前，本页保留已有内容",
  "the disk of {path} has not answered for {n} seconds": "{path} 所在的磁盘已有 {n} 秒没有应答",
  "recipe.toml cannot be read ({why})": "recipe.toml 无法读取（{why}）",
  "metrics.jsonl has a damaged line, which is left out": "metrics.jsonl 有一行损坏，已略去",
  "metrics.jsonl has {n} damaged lines, which are left out": "metrics.jsonl 有 {n} 行损坏，已略去",
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
