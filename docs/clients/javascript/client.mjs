// A client of the rollout server in plain JavaScript: no dependencies, Node 18 or later (and browsers).
// docs/wire.md describes every message. Groups are plain objects of typed arrays and header facts.

const DTYPES = { F64: Float64Array, F32: Float32Array, I32: Int32Array, U8: Uint8Array };
const COLUMNS = {
  scores: "F64", tokens: "I32", cu_seqlens: "I32", policy_versions: "I32", labels: "I32", distill_token_ids: "I32",
  inference_logprobs: "F32", advantages: "F32", ref_logprobs: "F32", distill_logprobs: "F32", loss_mask: "U8",
}; // widest type first, so that every column is aligned

/** One group as one safetensors blob. `columns` by name: typed arrays; `facts`: group_id, env_id, ticket, ... */
export function encodeGroup({ columns, facts }) {
  const versions = columns.policy_versions.filter((v, i) => i % 2 === 0 && v >= 0);
  const group = {
    wire_version: 1, ...facts,
    oldest_version: versions.length ? Math.min(...versions) : null,
    newest_version: versions.length ? Math.max(...versions) : null,
  };
  const header = { __metadata__: { group: JSON.stringify(group) } };
  const parts = [];
  let end = 0;
  for (const name of Object.keys(COLUMNS).filter((name) => columns[name])) {
    const column = columns[name], rows = columns.tokens.length;
    const shape = name === "policy_versions" ? [column.length / 2, 2]
      : name.startsWith("distill_") ? [rows, column.length / rows] : [column.length];
    header[name] = { dtype: COLUMNS[name], shape, data_offsets: [end, (end += column.byteLength)] };
    parts.push(new Uint8Array(column.buffer, column.byteOffset, column.byteLength));
  }
  let text = JSON.stringify(header);
  text += " ".repeat((8 - (new TextEncoder().encode(text).length % 8)) % 8);
  const json = new TextEncoder().encode(text);
  const length = new Uint8Array(8);
  new DataView(length.buffer).setBigUint64(0, BigInt(json.length), true);
  return concat([length, json, ...parts]);
}

/** Every group of a body: blobs, one after another. */
export function decodeGroups(bytes) {
  const groups = [];
  for (let at = 0; at < bytes.length; ) {
    const length = Number(new DataView(bytes.buffer, bytes.byteOffset + at, 8).getBigUint64(0, true));
    const start = at + 8 + length;
    const { __metadata__, ...entries } = JSON.parse(new TextDecoder().decode(bytes.subarray(at + 8, start)));
    const columns = {};
    let end = 0;
    for (const [name, { dtype, data_offsets }] of Object.entries(entries)) {
      columns[name] = new DTYPES[dtype](bytes.slice(start + data_offsets[0], start + data_offsets[1]).buffer);
      end = Math.max(end, data_offsets[1]);
    }
    groups.push({ columns, facts: JSON.parse(__metadata__.group), bytes: bytes.subarray(at, start + end) });
    at = start + end;
  }
  return groups;
}

/** Talks to one rollout server. Every call may be repeated, so connection errors, 429 and 5xx are tried again. */
export class RolloutClient {
  constructor(url, { token = null, deadlineS = 60 } = {}) {
    Object.assign(this, { url: url.replace(/\/$/, ""), token, deadlineS });
  }

  openRun(request) { return this.#json("POST", "/v1/run", request); }
  registerEnv(request) { return this.#json("POST", "/v1/envs", request); }
  tickets(request) { return this.#json("POST", "/v1/tickets", request); }
  renewTickets(update) { return this.#json("POST", "/v1/tickets/renew", update); }
  publishPolicy(session, policy_version) { return this.#json("POST", "/v1/policy", { session, policy_version }); }
  ack(step, session, policy_version) { return this.#json("POST", `/v1/batches/${step}/ack`, { session, policy_version }); }
  status() { return this.#json("GET", "/v1/status"); }

  async postGroups(groups) {
    const body = concat(groups.map(encodeGroup));
    return (await (await this.#send("POST", "/v1/groups", body, "application/vnd.atropos.groups")).json()).results;
  }

  /** The batch of a step; asks again until it is there or the deadline is over. */
  async lease(step, session) {
    for (const end = Date.now() + this.deadlineS * 1000; ; ) {
      const answer = await this.#send("POST", `/v1/batches/${step}/lease`, JSON.stringify({ session, wait_s: 20 }));
      if (answer.status === 200) return decodeGroups(new Uint8Array(await answer.arrayBuffer()));
      const { waiting_for } = await answer.json();
      if (Date.now() > end) throw new Error(`no batch for step ${step} within ${this.deadlineS} s: ${waiting_for}`);
    }
  }

  async #json(method, path, body) {
    const answer = await this.#send(method, path, body && JSON.stringify(body));
    return answer.status === 204 ? null : answer.json();
  }

  async #send(method, path, body, type = "application/json") {
    const headers = { "Content-Type": type, ...(this.token && { Authorization: `Bearer ${this.token}` }) };
    for (let pauseS = 0.2, end = Date.now() + this.deadlineS * 1000; ; pauseS = Math.min(pauseS * 2, 5)) {
      let problem;
      try {
        const signal = AbortSignal.timeout(90_000); // longer than the longest wait_s
        const answer = await fetch(this.url + path, { method, body, headers, signal });
        if (answer.ok) return answer;
        problem = `${answer.status} ${await answer.text()}`;
        if (answer.status !== 429 && answer.status < 500) throw Object.assign(new Error(problem), { isFinal: true });
      } catch (error) {
        if (error.isFinal) throw error;
        problem ??= String(error.cause ?? error);
      }
      if (Date.now() + pauseS * 1000 > end) throw new Error(`${this.url} did not answer ${method} ${path}: ${problem}`);
      await new Promise((resolve) => setTimeout(resolve, pauseS * 1000));
    }
  }
}

function concat(parts) {
  const whole = new Uint8Array(parts.reduce((size, part) => size + part.length, 0));
  parts.reduce((at, part) => (whole.set(part, at), at + part.length), 0);
  return whole;
}
