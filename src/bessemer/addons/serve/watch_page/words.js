// The live page in English and Chinese; names of runs, stages, files and metrics stay as they are.

import { browserLanguage, speech } from "./speech.js";

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
  "run": "运行", "stage": "阶段", "planned": "预计", "measured": "实测", "of the plan": "实测/预计", "all": "合计", "{n} %": "{n}%",
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

export const language = browserLanguage();
export const { t, translatePage, offerOther } = speech(ZH, language);

// What the server said in English, in the page's language: its replies bring their Chinese (chinese.toml).
const known = new Map();
export function learn({ zh }) {
  for (const [english, chinese] of Object.entries(zh)) known.set(english, chinese);
}
export const told = (text) => (language === "zh" && known.get(text)) || text;
