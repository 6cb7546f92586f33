// The page in English and Chinese. The English texts are the keys, with {places} for what varies; what a model or the
// server says stays as it is.

import { browserLanguage, speech } from "./speech.js";
import { loadSettings } from "./state.js";

const ZH = {
  // header, footer
  "Settings": "设置", "Tokens": "词元", "Chats": "对话", "New chat": "新对话", "Models": "模型", "Examples": "示例",
  "Conversation": "对话", "Conversations": "对话列表", "Your question": "你的问题", "Ask something": "问点什么", "Think": "思考",
  "Training": "训练", "The live page of this run: curves, expert loads, rollouts": "这次运行的实时页面：曲线、专家负载、采样回答",
  "Send": "发送", "Send (Enter)": "发送（回车）", "Stop": "停止", "Stop (Esc)": "停止（Esc）", "Side by side": "并排",
  "sends": "发送", "new line": "换行", "stops": "停止", "edits the last question": "修改上一个问题",
  "unlikely": "低概率", "likely": "高概率", "; point at a token to see what else it might have been": "；指向词元可看其他可能",
  "Shade each token by its probability (before temperature); point at one for alternatives and experts":
    "按概率（温度之前）为每个词元着色；指向词元可看备选和专家",
  "This server asks for a key": "服务器要求密钥", "Use it": "使用", "Ask {names}": "问 {names}", "all {n}": "全部 {n} 个",
  " and ": " 和 ", "Let up to {n} models answer the same question": "让最多 {n} 个模型回答同一个问题",
  "The models on the way to DeepSeek-R1": "通往 DeepSeek-R1 的各个模型",
  // start
  "Ask any stage of the run": "向任一训练阶段提问", "Ask the model": "向模型提问",
  "Every stage is a model of its own. Put up to four side by side and watch what training changed.":
    "每个阶段都是一个独立的模型。最多可并排四个，看看训练改变了什么。",
  "The examples are held-out problems, never trained on; every answer to them is checked.":
    "示例是从未用于训练的题目，每个回答都会被核对。",
  "Nothing is recorded of what these models were trained on.": "没有关于这些模型训练内容的记录。",
  "practised": "练习过", "read about": "读到过", "{task} (solves {shares} of held-out problems)": "{task}（留出题答对 {shares}）",
  "trained on texts of up to {n} tokens: answers end there unless you set another maximum":
    "训练文本最长 {n} 个词元：除非另设上限，回答到此为止",
  "Countdown": "算数凑值", "Arithmetic": "四则运算", "Plain words": "日常请求", "Word problems": "应用题", "Logic": "逻辑",
  "English": "英文", "Chinese": "中文",
  "pre-trained only": "仅预训练",
  "R1-Zero: reinforcement learning from the base, no examples of thinking": "R1-Zero：从基座直接强化学习，没有思考示例",
  "R1, the final model": "R1，最终模型", "R1 Dev1: fine-tuned on the cold start": "R1 Dev1：冷启动微调",
  "R1 Dev2: reinforcement learning on reasoning": "R1 Dev2：推理强化学习",
  "R1 Dev3: fine-tuned on chosen answers of Dev2": "R1 Dev3：用 Dev2 的优选回答微调",
  "a smaller model that learnt from R1's answers": "向 R1 的回答学习的小模型",
  "{n} parameters": "{n} 参数", "{n} parameters, {active} active per token": "{n} 参数，每个词元激活 {active}",
  "{k} of {n} experts in each of {layers} layers": "{layers} 层，每层 {n} 个专家中选 {k} 个",
  "context of {n} tokens": "上下文 {n} 个词元",
  // answers
  "Stop this answer": "停止这个回答", "Thought by {model}": "{model} 的思考", "Answer by {model}": "{model} 的回答",
  "Use this seed for the next answers too": "以后的回答也用这个种子", "Copy": "复制", "Copy the answer": "复制回答",
  "Copied": "已复制", "Not allowed": "不允许", "Continue": "继续", "Let it continue from here": "让它从这里继续",
  "Retry": "重试", "Ask this model again": "再问一次这个模型", "{why} Asking again in {n} s.": "{why} {n} 秒后重试。",
  "being loaded": "正在加载", "thinking": "思考中", "{n} token": "{n} 个词元", "{n} tokens": "{n} 个词元",
  "Thinking for {tokens}, {time}": "思考了 {tokens}，{time}", "Thought for {tokens}, {time}": "思考了 {tokens}，{time}",
  "Stopped.": "已停止。", "Stopped before the first token.": "还没开始就停止了。", "No answer followed.": "没有给出回答。",
  "Cut off after {tokens}.": "{tokens} 后被截断。", "Cut off after {tokens}, inside its thought.": "{tokens} 后在思考中被截断。",
  "It was trained on texts of up to {n} tokens.": "它的训练文本最长 {n} 个词元。",
  "Its context of {n} tokens is full.": "它的 {n} 个词元上下文已满。",
  "{n} tokens/s": "{n} 词元/秒", "first in {time}": "首个 {time}", "seed {n}": "种子 {n}",
  "Right": "正确", "Wrong": "错误", "Checked by the verifier of {task}": "由 {task} 的验证器核对",
  "another value": "数值不对", "other numbers": "用错了数字", "no answer to read": "读不出答案", "unfinished": "没有写完", "the answer is in its thought": "答案只在思考里",
  "several answers": "给了多个答案", "it repeats the question": "重复了题目",
  "Edit": "修改", "Edit the question": "修改问题", "Edit and ask again from here": "修改并从这里重新提问",
  "The question, edited": "修改后的问题", "Cancel": "取消", "Ask again": "重新提问", "no answer": "没有回答",
  // notices
  "Undo": "撤销", "Now": "现在", "The turn was replaced.": "这一轮已替换。", "Later turns were dropped.": "后面的轮次已丢弃。",
  "Nothing is stored any more.": "已删除全部存储。", "Seed {n} is used from now on.": "从现在起使用种子 {n}。",
  "The server no longer has this model.": "服务器上已没有这个模型。", "The conversation was deleted.": "对话已删除。",
  "{words} Trying again.": "{words} 正在重试。", "{words} Trying again every {n} seconds.": "{words} 每 {n} 秒重试一次。",
  "The server does not answer.": "服务器没有响应。", "The queue is full.": "队列已满。",
  "All models in memory are busy.": "内存中的模型都在忙。", "The server is shutting down.": "服务器正在关闭。",
  "The server rejected this key.": "服务器拒绝了这个密钥。", "This server requires a key.": "服务器要求密钥。",
  "The server does not know this model.": "服务器不认识这个模型。", "The server offers no model.": "服务器没有提供模型。",
  "The conversation is too large for the server.": "对话太大，服务器无法接受。",
  "The connection was lost before the answer was complete.": "回答完成之前连接断开了。",
  // conversations
  "Close": "关闭", "Delete": "删除", "Delete {name}": "删除 {name}", "Save as Markdown": "存为 Markdown",
  "Save as JSON": "存为 JSON", "No conversation yet.": "还没有对话。", "Stored in this browser only.": "只存储在这个浏览器里。",
  // settings
  "System prompt": "系统提示", "none": "无", "Temperature": "温度", "Top-p": "Top-p", "Top-k": "Top-k", "Min-p": "Min-p",
  "Repetition penalty": "重复惩罚", "Maximum tokens": "最多词元", "Seed": "种子", "Thinking": "思考", "Thoughts": "思考过程",
  "Models read": "模型读到", "Thinking budget": "思考预算", "Theme": "主题", "Language": "语言",
  "0 always takes the likeliest token; higher is more varied": "0 总取最可能的词元；越高越多样",
  "samples from the likeliest tokens that together have this probability": "从合计达到此概率的词元中采样",
  "samples from this many of the likeliest tokens; 0: from all": "从这么多最可能的词元中采样；0：全部",
  "samples from tokens with at least this share of the likeliest one's probability": "只取概率不低于最高者此比例的词元",
  "above 1, tokens that have already occurred become less likely": "大于 1 时，出现过的词元更少出现",
  "the longest answer, thought included": "回答的最大长度，含思考",
  "empty: a new one for every answer. The same seed and question give the same answer":
    "留空：每次都换。同样的种子和问题得到同样的回答",
  "whether the models think before they answer": "模型是否先思考再回答", "the model decides": "由模型决定", "always": "总是",
  "never": "从不", "open at first: a thought folds when its answer begins": "先展开：回答开始后折叠",
  "open at first": "先展开", "open": "展开", "folded": "折叠",
  "models trained on single questions may do better without the earlier turns": "只练过单个问题的模型，不看前文可能更好",
  "the conversation": "整个对话", "the question alone": "只有问题",
  "after this many tokens of thought the answer begins; empty: no limit": "思考这么多词元后开始回答；留空：不限",
  "light or dark; as the system has it: auto": "浅色或深色；自动：跟随系统", "auto": "自动", "light": "浅色", "dark": "深色",
  "of the page; models answer in the language of the question": "页面的语言；模型按问题的语言回答",
  "up to {n}": "最多 {n}", "as many as fit": "能放多少算多少", "fresh": "每次新的", "no limit": "不限",
  "each model's default": "各模型默认", "Reset to the defaults": "恢复默认", "Delete everything stored here": "删除这里存储的一切",
  "The conversations, the settings and the key": "对话、设置和密钥",
  "The conversations and settings are stored in this browser only.": "对话和设置只存储在这个浏览器里。",
};

const chosen = loadSettings().language;
export const language = chosen === "auto" ? browserLanguage() : chosen;

export const { t, translatePage } = speech(ZH, language);
