// Conversations, kept in this browser (IndexedDB) and nowhere else.
//
// A conversation is a tree: editing a question or asking again adds a branch, and `chosen` says which one is shown. What was
// said is never overwritten.

const NAME = "fastft";
let opened;

// Tells other tabs of this browser which conversation has changed.
export const elsewhere = new BroadcastChannel(NAME);

function database() {
  opened ||= new Promise((resolve, reject) => {
    const request = indexedDB.open(NAME, 1);
    request.onupgradeneeded = () => {
      request.result.createObjectStore("conversations", { keyPath: "id" });
      request.result.createObjectStore("rounds", { keyPath: "tab" });
    };
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
  return opened;
}

async function run(store, mode, act) {
  const db = await database();
  return new Promise((resolve, reject) => {
    const request = act(db.transaction(store, mode).objectStore(store));
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

// All of these resolve to false where the browser keeps nothing (a private window, a full disk).
const tried = (promise) => promise.then((value) => value ?? true, () => false);
const tell = (id) => (done) => {
  if (done) elsewhere.postMessage(id);
  return done;
};
export const save = (conversation) => tried(run("conversations", "readwrite", (s) => s.put(structuredClone(conversation)))).then(tell(conversation.id));
export const remove = (id) => tried(run("conversations", "readwrite", (s) => s.delete(id))).then(tell(id));
export const load = async (id) => {
  const found = await tried(run("conversations", "readonly", (s) => s.get(id)));
  return found && found.nodes ? found : null;
};
export const saveRound = (round) => tried(run("rounds", "readwrite", (s) => s.put(structuredClone(round))));
export const loadRound = async (tab) => {
  const found = await tried(run("rounds", "readonly", (s) => s.get(tab)));
  return found && found.turns ? found : null;
};
export const all = async () => {
  const found = await tried(run("conversations", "readonly", (s) => s.getAll()));
  return found === false ? null : found.sort((a, b) => b.changed - a.changed);
};

export const newId = () => Array.from(crypto.getRandomValues(new Uint8Array(12)), (b) => b.toString(16).padStart(2, "0")).join("");

export function newConversation(model) {
  return { id: newId(), title: "", created: Date.now(), changed: Date.now(), model, settings: {}, nodes: {}, chosen: {} };
}

export function add(conversation, parent, fields) {
  const node = { id: newId(), parent: parent || "", at: Date.now(), content: "", ...fields };
  conversation.nodes[node.id] = node;
  conversation.chosen[node.parent] = node.id;
  conversation.changed = Date.now();
  if (!conversation.title && node.role === "user") conversation.title = node.content.trim().slice(0, 80);
  return node;
}

export const versions = (conversation, parent) => Object.values(conversation.nodes).filter((node) => node.parent === parent);

// The messages that are shown, from the first one on; up to `last`, if it is given.
export function path(conversation, last) {
  const found = [];
  for (let id = conversation.chosen[""]; id; id = conversation.chosen[id]) {
    found.push(conversation.nodes[id]);
    if (id === last) break;
  }
  return found;
}

// What a model is asked with. An answer of which nothing came is left out with its question, as if it had not been asked.
export function messages(settings, nodes) {
  const found = settings.system ? [{ role: "system", content: settings.system }] : [];
  nodes.forEach((node, i) => {
    const next = nodes[i + 1];
    if (node.role === "assistant" ? !node.content : next && !next.content) return;
    found.push({ role: node.role, content: node.content });
  });
  return found;
}

export function parameters(settings) {
  const found = {};
  for (const name of ["temperature", "top_p", "max_tokens"]) if (settings[name] !== undefined && settings[name] !== "") found[name] = Number(settings[name]);
  return found;
}

// Files ---------------------------------------------------------------------------------------------------------------------

export function asText(conversation) {
  const parts = path(conversation).map((node) => `**${node.role === "user" ? "You" : node.model || "model"}**\n\n${node.content}`);
  return `# ${conversation.title}\n\n${parts.join("\n\n")}\n`;
}

// The form that `fastft clean` and `fastft train` read.
export function asConversation(conversation) {
  const nodes = path(conversation);
  const system = conversation.settings.system ? [{ role: "system", content: conversation.settings.system, train: false, ends: true }] : [];
  const rows = nodes.map((node) => ({
    role: node.role,
    content: node.content,
    train: node.role === "assistant",
    ends: node.role === "user" || (node.state === "done" && node.finish !== "length"),
  }));
  const models = [...new Set(nodes.map((node) => node.model).filter(Boolean))];
  const whole = { id: conversation.id, source: "fastft page", lang: "", model: models.join("+"), part: 0, parts: 1, messages: [...system, ...rows] };
  return `${JSON.stringify(whole)}\n`;
}

export function download(name, content) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([content], { type: "application/octet-stream" }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}
