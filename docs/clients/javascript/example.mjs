// node example.mjs http://127.0.0.1:8000: plays trainer and environment for one step, and prints what came back.
import { randomUUID } from "node:crypto";
import { RolloutClient, encodeGroup } from "./client.mjs";

const client = new RolloutClient(process.argv[2] ?? "http://127.0.0.1:8000", { token: process.env.ATROPOS_TOKEN });

// Trainer: open a run, and say that the inference servers run version 0.
const run = await client.openRun({ run_name: "from-javascript", batch_size: 2, num_steps: 10 });
await client.publishPolicy(run.session, 0);

// Environment: join, get leave to start a group, roll it out, deliver it.
const env = await client.registerEnv({ name: "javascript", group_size: 2 });
const { tickets } = await client.tickets({ env_id: env.env_id, session: env.session, sequences: 2, wait_s: 10 });
const group = {
  columns: {
    tokens: Int32Array.of(1, 2, 3, 70000, 1, 2, 4), // two sequences: a prompt of two tokens, then the completion
    cu_seqlens: Int32Array.of(0, 4, 7),
    loss_mask: Uint8Array.of(0, 0, 1, 1, 0, 0, 1),
    inference_logprobs: Float32Array.of(0, 0, -0.1, -1.5, 0, 0, -0.25),
    policy_versions: Int32Array.of(-1, 2, 0, 2, -1, 2, 0, 1), // runs of (version, length); -1: nobody sampled
    scores: Float64Array.of(1, 0.1),
  },
  facts: {
    group_id: randomUUID(), env_id: env.env_id, run_id: env.run.run_id, ticket: tickets[0].ticket,
    finish_reasons: ["stop", "length"], messages: [[{ role: "user", content: "¿Qué? 你好 🙂" }]],
  },
};
const [result] = await client.postGroups([group]);

// Trainer: lease the batch of step 0, train on it, acknowledge it.
const batch = await client.lease(0, run.session);
await client.ack(0, run.session, 1);
const again = await client.postGroups([group]);

console.log(JSON.stringify({
  status: result.status,
  repeated: again[0].status,
  same_bytes: Buffer.compare(batch[0].bytes, encodeGroup(group)) === 0,
  tokens: [...batch[0].columns.tokens],
  scores: [...batch[0].columns.scores],
  facts: batch[0].facts,
  session: run.session,
  step: (await client.status()).step,
}));
