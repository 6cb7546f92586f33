// The page in English and Chinese. The English texts are the keys, with {places} for what varies; what a model or the
// server says stays as it is.

import { browserLanguage, speech } from "./speech.js";
import { loadSettings } from "./state.js";

const ZH = {
  // header, footer
  "Settings": "设置", "Tokens": "词元", "Chats": "对话", "New chat": "新对话", "Models": "模型", "Examples": "示例",
  "Conversation": "对话", "Conversations": "历史对话", "Your question": "你的问题", "Ask something": "输入问题", "Think": "思考",
  "Training": "训练", "The live page of this run: curves, expert loads, rollouts": "这次运行的实时页面：曲线、专家负载、采样回答",
  "Send": "发送", "Send (Enter)": "发送（Enter）", "Stop": "停止", "Stop (Esc)": "停止（Esc）", "Side by side": "并排对比",
  "sends": "发送", "new line": "换行", "stops": "停止", "edits the last question": "编辑上一个问题",
  "unlikely": "低概率", "likely": "高概率", "; point at a token to see what else it might have been": "；指向词元可查看其他候选",
  "Shade each token by its probability (before temperature); point at one for alternatives and experts":
    "按概率（施加温度前）为每个词元着色；指向词元可查看候选词元和专家",
  "This server requires a key": "此服务器需要密钥", "Use it": "确定", "Ask {names}": "问 {names}", "all {n}": "全部 {n} 个",
  " and ": " 和 ", "Let up to {n} models answer the same question": "最多让 {n} 个模型回答同一个问题",
  "The models on the way to DeepSeek-R1": "训练到 DeepSeek-R1 途中的各个模型",
  // start
  "Ask any stage of the run": "向任一训练阶段提问", "Ask the model": "向模型提问",
  "Every stage is a model of its own. Put up to four side by side and watch what training changed.":
    "每个阶段都是一个独立的模型。最多可并排对比四个，看看训练带来了什么变化。",
  "The examples are held-out problems, never trained on; every answer to them is checked.":
    "示例均为从未用于训练的留出题，每个回答都会自动判分。",
  "There is no record of what these models were trained on.": "没有这些模型训练内容的记录。",
  "practised: {tasks}": "训练过：{tasks}", "read about: {tasks}": "语料中见过：{tasks}",
  "{task} (solves {shares} of held-out problems)": "{task}（留出题答对 {shares}）",
  "trained on texts of up to {n} tokens: answers end there unless you set another maximum":
    "训练文本最长 {n} 个词元：未另设上限时，回答到此为止",
  "trained on single questions: reads each alone unless you set otherwise": "只用单轮问题训练：未另行设置时，仅看当前问题",
  "Countdown": "凑数题", "Arithmetic": "四则运算", "Plain words": "日常请求", "Word problems": "应用题", "Logic": "逻辑",
  "English": "英文", "Chinese": "中文", ", ": "、",
  "pre-trained only": "仅经过预训练",
  "R1-Zero: reinforcement learning from the base, no examples of thinking": "R1-Zero：从基座模型直接做强化学习，不用思考示例",
  "R1, the final model": "R1，最终模型", "R1 Dev1: fine-tuned on the cold start": "R1 Dev1：用冷启动数据微调",
  "R1 Dev2: reinforcement learning on reasoning": "R1 Dev2：推理强化学习",
  "R1 Dev3: fine-tuned on chosen answers of Dev2": "R1 Dev3：用 Dev2 的精选回答微调",
  "a smaller model that learnt from R1's answers": "用 R1 的回答蒸馏出的小模型",
  "{n} %": "{n}%", "{n} parameters": "{n}参数", "{n} parameters, {active} active per token": "{n}参数，每个词元激活 {active}",
  "{n} more in MTP modules": "MTP 模块另有 {n}参数",
  "{k} of {n} experts in each of {layers} layers": "{layers} 个 MoE 层，每层从 {n} 个专家中选 {k} 个",
  "context of {n} tokens": "上下文长度 {n} 个词元",
  // answers
  "Stop this answer": "停止这个回答", "Thought by {model}": "{model} 的思考", "Answer by {model}": "{model} 的回答",
  "Use this seed for the next answers too": "后续回答也使用此种子", "Copy": "复制", "Copy the answer": "复制回答",
  "Copied": "已复制", "Not allowed": "复制被禁止", "Continue": "继续", "Let it continue from here": "让它从此处续写",
  "Retry": "重试", "Ask this model again": "让此模型重新回答", "{why} Trying again in {n} s.": "{why}{n} 秒后重试。",
  "loading": "加载中", "thinking": "思考中", "{n} token": "{n} 个词元", "{n} tokens": "{n} 个词元",
  "Thinking for {tokens}, {time}": "正在思考：{tokens}，{time}", "Thought for {tokens}, {time}": "已思考：{tokens}，{time}",
  "Stopped.": "已停止。", "Stopped before the first token.": "在生成第一个词元前停止。", "No answer followed.": "没有给出回答。",
  "Cut off after {tokens}.": "在 {tokens}处被截断。", "Cut off after {tokens}, inside its thought.": "在 {tokens}处被截断，思考尚未结束。",
  "It was trained on texts of up to {n} tokens.": "模型的训练文本最长 {n} 个词元。",
  "Its context of {n} tokens is full.": "{n} 个词元的上下文已用完。",
  "{n} tokens/s": "{n} 词元/秒", "first in {time}": "首词元 {time}", "seed {n}": "种子 {n}",
  "Right": "正确", "Wrong": "错误", "Wrong: {why}": "错误：{why}", "Checked by the verifier of {task}": "由“{task}”的验证器判定",
  "another value": "数值不对", "other numbers": "用了别的数字", "no answer to read": "无法读出答案", "unfinished": "未写完",
  "the answer is in its thought": "答案只出现在思考里",
  "several answers": "给出了多个答案", "it repeats the question": "只是重复题目",
  "Edit": "编辑", "Edit the question": "编辑问题", "Edit and ask again from here": "编辑并从这里重新提问",
  "The question, edited": "编辑后的问题", "Cancel": "取消", "Ask again": "重新提问", "no answer": "没有回答",
  // the card of a token
  "{k} of {n} experts, layers {first} to {last}": "第 {first} 至 {last} 层，每层从 {n} 个专家中选 {k} 个",
  "{k} of {n} experts, layer {first}": "第 {first} 层，从 {n} 个专家中选 {k} 个", "Experts in {layers}": "选中的专家：{layers}",
  "layer {n}: {experts}": "第 {n} 层：{experts}", "(nothing)": "（空）",
  // notices
  "Undo": "撤销", "Now": "立即重试", "The turn was replaced.": "已替换这一轮对话。", "Later turns were dropped.": "已移除后面的各轮对话。",
  "Everything stored here was deleted.": "已清除所有存储内容。", "Seed {n} is used from now on.": "此后使用种子 {n}。",
  "The server no longer has this model.": "服务器上已没有此模型。", "The conversation was deleted.": "已删除对话。",
  "{words} Trying again.": "{words}正在重试。", "{words} Trying again every {n} seconds.": "{words}每 {n} 秒重试一次。",
  "The server does not answer.": "服务器没有响应。", "The queue is full.": "请求队列已满。",
  "All models in memory are busy.": "内存中的模型都在使用中。", "The server is shutting down.": "服务器正在关闭。",
  "The server rejected this key.": "服务器拒绝了这个密钥。", "This server requires a key.": "此服务器需要密钥。",
  "The server does not know this model.": "服务器上没有此模型。", "The server offers no model.": "服务器未提供任何模型。",
  "The conversation is too large for the server.": "对话过长，超出服务器限制。",
  "The connection was lost before the answer was complete.": "回答未完成，连接已断开。",
  "The conversation is longer than the model's context: start a new chat, or let models read the question alone (in the settings).":
    "对话超出了模型的上下文长度：请新建对话，或在设置中让模型只看当前问题。",
  "The page could not follow the answer: {why}.": "页面无法继续接收回答：{why}。",
  "The server sent something that is not a chunk of an answer.": "服务器发来的内容不是回答片段。",
  "The server refused the request ({n}).": "服务器拒绝了请求（{n}）。", "The server failed ({n}).": "服务器出错（{n}）。",
  // conversations
  "Close": "关闭", "Delete": "删除", "Delete {name}": "删除 {name}", "Save as Markdown": "导出 Markdown",
  "Save as JSON": "导出 JSON", "No conversation yet.": "暂无对话。", "Stored in this browser only.": "仅存储在此浏览器中。",
  // settings
  "System prompt": "系统提示词", "none": "无", "Temperature": "温度", "Top-p": "Top-p", "Top-k": "Top-k", "Min-p": "Min-p",
  "Repetition penalty": "重复惩罚", "Maximum tokens": "最大词元数", "Seed": "种子", "Thinking": "思考", "Thoughts": "思考过程",
  "Models read": "模型可见内容", "Thinking budget": "思考预算", "Theme": "外观", "Language": "语言",
  "0 always takes the likeliest token; higher is more varied": "为 0 时总取概率最高的词元；越高越多样",
  "samples from the likeliest tokens that together have this probability": "从概率最高、累计概率达到此值的词元中采样",
  "samples from this many of the likeliest tokens; 0: from all": "只从概率最高的若干个词元中采样；0 表示不限",
  "samples from tokens with at least this share of the likeliest one's probability": "只从概率不低于最高概率此比例的词元中采样",
  "above 1, tokens that have already occurred become less likely": "大于 1 时，降低已出现词元的概率",
  "the longest answer, thought included": "回答的最大长度，包括思考过程",
  "empty: a new one for every answer. The same seed and question give the same answer":
    "留空则每次回答换一个。种子和问题都相同时，回答也相同",
  "whether the models think before they answer": "模型回答前是否先思考", "the model decides": "由模型决定", "always": "总是",
  "never": "从不", "open at first: a thought folds when its answer begins": "先展开：开始回答后自动折叠思考过程",
  "open at first": "先展开", "open": "展开", "folded": "折叠",
  "auto: models that were trained on single questions read the question alone, others the conversation":
    "自动：只用单轮问题训练的模型仅看当前问题，其他模型看整个对话",
  "read the question alone": "仅看了当前问题",
  "the conversation": "整个对话", "the question alone": "仅当前问题",
  "the answer begins after this many tokens of thought; empty: no limit": "思考达到此词元数后开始回答；留空则不限",
  "light or dark; auto: as the system has it": "浅色或深色；自动：跟随系统设置", "auto": "自动", "light": "浅色", "dark": "深色",
  "of the page; models answer in the language of the question": "页面语言；模型用提问的语言回答",
  "up to {n}": "最多 {n}", "as many as fit": "以上下文为限", "new each time": "每次随机", "no limit": "不限",
  "each model's default": "各模型的默认值", "Reset to the defaults": "恢复默认设置", "Delete everything stored here": "清除此处存储的所有内容",
  "The conversations, the settings and the key": "对话、设置和密钥",
  "The conversations and settings are stored in this browser only.": "对话和设置仅存储在此浏览器中。",
};

const chosen = loadSettings().language;
export const language = chosen === "auto" ? browserLanguage() : chosen;

export const { t, translatePage } = speech(ZH, language);
