// The site's search, in place of the theme's worker and with its messages: {type, data} of type 0, an index, answered by
// type 1; of type 2, a query, answered by type 3.
//
// A result has any of the words, best first by BM25 with titles above text; a page's weight puts guides above the API.
// Chinese is read by pairs of characters. A Chinese term of the glossary also stands for its English words, so that a
// Chinese question finds English pages.
"use strict"
;(() => {
  const PART = /\p{Script=Han}+|(?:(?!\p{Script=Han})[\p{L}\p{N}])+/gu
  const HAN = /\p{Script=Han}/u
  const TITLE = 6, PATH = 2, SATURATION = 1.2, FLAT = 0.4, TYPED = 0.4, OTHER = 0.8, UNKNOWN = 0.5, MISTYPED = 0.6, LEAST = 0.2, SIZE = 10
  const EMPTY = new Set(
    ("a about an and any are at be by can do does example examples for from get has have how i if in is it its me my of on or our should so that the " +
      "there this to use using was we what when where which want will with would you your 如何 怎么 怎样 么写 么样 么办 什么 哪些 可以 需要").split(" "))

  const NUMBERS = Object.fromEntries("zero one two three four five six seven eight nine ten".split(" ").map((name, i) => [name, `${i}`]))

  /** A word without its ending: trains, trained and training are one. Eight is 8. */
  const stem = word => {
    if (Object.hasOwn(NUMBERS, word)) return NUMBERS[word]
    if (word.length < 4 || /\d/.test(word)) return word
    const short = word.replace(/(?:ies|ing|ed|es|s|e|y)$/, "")
    return short.length < 3 ? word : short.replace(/([^aeiou])\1$/, "$1")
  }
  const pairs = run => run.length < 2 ? [run] : Array.from({ length: run.length - 1 }, (_, i) => run.slice(i, i + 2))
  const keys = part => (HAN.test(part) ? pairs(part) : [stem(part)])
  const plain = html => html.toLowerCase().replace(/<[^>]*>|&\w+;/g, tag => " ".repeat(tag.length))
  const words = html => plain(html).match(PART) || []

  /** Whether two words differ by one letter more, less, other or swapped with its neighbour. */
  const near = (a, b) => {
    if (Math.abs(a.length - b.length) > 1) return false
    let from = 0, end = 0
    while (from < a.length && a[from] === b[from]) from++
    while (end < Math.min(a.length, b.length) - from && a.at(-1 - end) === b.at(-1 - end)) end++
    const [x, y] = [a.slice(from, a.length - end), b.slice(from, b.length - end)]
    return (x.length < 2 && y.length < 2) || (x.length === 2 && x === y[1] + y[0])
  }

  let items, found, terms, others, last = { input: null, ranked: [] }

  function read({ config, items: given }) {
    items = given
    const known = Object.entries(config.terms || {}).sort(([a], [b]) => b.length - a.length)
    terms = known.filter(([name]) => HAN.test(name))
    others = new Map(known.filter(([name]) => !HAN.test(name)).map(([name, here]) => [stem(name), here]))
    found = new Map() // key: {item: how much of it the item has}
    const texts = items.map(item => words(item.text).flatMap(keys))
    const mean = texts.reduce((sum, text) => sum + text.length, 0) / (items.length || 1) || 1
    const count = (at, key, value) => {
      if (!found.has(key)) found.set(key, new Map())
      found.get(key).set(at, (found.get(key).get(at) || 0) + value)
    }
    items.forEach((item, at) => {
      const share = 1 / (FLAT + ((1 - FLAT) * texts[at].length) / mean)
      for (const key of texts[at]) count(at, key, share)
      const title = new Set(words(item.title).filter(word => !EMPTY.has(word)).flatMap(keys))
      for (const key of title) count(at, key, TITLE / Math.sqrt(title.size))
      for (const key of new Set((item.path || []).flatMap(words).flatMap(keys))) count(at, key, PATH)
    })
  }

  const said = name => words(name).filter(word => !EMPTY.has(word)).flatMap(keys)
  const rarity = key => Math.log(1 + items.length / (1 + (found.get(key)?.size || 0)))

  /** What a question asks for: ideas, each with ways to say it, each a list of keys and how much they count. */
  function ideas(input) {
    const parts = plain(input).match(PART) || []
    const asked = []
    for (const [place, part] of parts.entries()) {
      if (!HAN.test(part)) {
        if (EMPTY.has(part) && parts.length > 1) continue
        const ways = [[[stem(part)], 1], ...(others.get(stem(part)) || []).map(name => [said(name), OTHER])]
        const known = [...found.keys()]
        if (place === parts.length - 1 && part.length > 1)
          ways.push(...known.filter(key => key !== stem(part) && key.startsWith(part)).map(key => [[key], TYPED]))
        if (ways.length === 1 && !found.has(stem(part)) && part.length > 3)
          ways.push(...known.filter(key => near(key, stem(part))).map(key => [[key], MISTYPED]))
        asked.push(ways)
        continue
      }
      let rest = part
      for (const [chinese, english] of terms) {
        if (!rest.includes(chinese)) continue
        rest = rest.replaceAll(chinese, " ")
        asked.push([[pairs(chinese), 1], ...english.map(name => [said(name), 1])])
      }
      for (const run of rest.split(" ")) {
        const left = pairs(run).filter(pair => pair.length > 1 && !EMPTY.has(pair))
        if (left.length) asked.push([[left, UNKNOWN]])
      }
    }
    return asked
  }

  function ranked(input) {
    const asked = ideas(input).map(ways => ways.filter(([own]) => own.some(key => found.has(key)))).filter(ways => ways.length)
    const scores = new Map(), covered = new Map()
    let all = 0
    for (const ways of asked) {
      const worth = Math.max(...ways.map(([own, factor]) => (factor === UNKNOWN ? factor : 1) * own.reduce((sum, key) => sum + rarity(key), 0) / own.length))
      all += worth
      const best = new Map(), share = new Map()
      const most = (map, at, value) => map.set(at, Math.max(map.get(at) || 0, value))
      for (const [own, factor] of ways) {
        const sums = new Map(), had = new Map()
        for (const key of own)
          for (const [at, amount] of found.get(key) || []) {
            sums.set(at, (sums.get(at) || 0) + amount / (SATURATION + amount) / own.length)
            had.set(at, (had.get(at) || 0) + 1 / own.length)
          }
        for (const [at, sum] of sums) most(best, at, factor * sum), most(share, at, had.get(at))
      }
      for (const [at, part] of best) {
        scores.set(at, (scores.get(at) || 0) + worth * part)
        covered.set(at, (covered.get(at) || 0) + worth * share.get(at))
      }
    }
    const chinese = HAN.test(input)
    const list = [...scores].map(([at, score]) => {
      const other = !chinese && HAN.test(items[at].title) ? 0.5 : 1
      return [at, score * (covered.get(at) / all) ** 1.5 * (items[at].weight ?? 1) * other]
    })
    list.sort(([a, x], [b, y]) => y - x || a - b)
    return list.filter(([, score]) => score >= LEAST * list[0][1]).map(([at]) => at)
  }

  /** Where the asked words stand in a field, for the marks of the result. */
  function marks(text, wanted) {
    const ranges = []
    for (const { 0: part, index } of plain(text).matchAll(PART)) {
      if (!HAN.test(part)) {
        if (wanted.has(stem(part))) ranges.push({ start: index, end: index + part.length, value: part.length })
        continue
      }
      pairs(part).forEach((pair, place) => {
        const start = index + place, open = ranges.at(-1)
        if (!wanted.has(pair)) return
        if (open && open.end >= start) (open.end = start + pair.length), (open.value = open.end - open.start)
        else ranges.push({ start, end: start + pair.length, value: pair.length })
      })
    }
    return ranges
  }

  function answer({ input, page }) {
    input = typeof input === "string" ? input : ""
    if (input !== last.input) last = { input, ranked: input.trim() ? ranked(input) : [], keys: new Set(ideas(input).flat(2).flat()) }
    const from = page?.from || 0, total = last.ranked.length
    const shown = last.ranked.slice(from, from + SIZE).map(id => ({
      id,
      matches: ["title", "path", "text"].map(field => {
        const value = items[id][field]
        const text = Array.isArray(value) ? value.join("") : value || ""
        return { id, field, score: 0, value: { text, highlight: { ranges: marks(text, last.keys) } } }
      })
    }))
    return {
      items: shown,
      query: { select: { documents: null, terms: null }, values: [] },
      aggregations: [],
      pagination: {
        total,
        prev: from ? { from: from - SIZE, size: SIZE } : undefined,
        next: from + SIZE < total ? { from: from + SIZE, size: SIZE } : undefined
      }
    }
  }

  self.onmessage = ({ data: { type, data } }) => {
    if (type === 0) read(data), self.postMessage({ type: 1 })
    if (type === 2) self.postMessage({ type: 3, data: answer(data) })
  }
})()
