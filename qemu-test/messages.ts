/**
 * What guest and host say to each other on the guest's second serial port: one JSON document per line.
 * The console, on the first port, is for people.
 */

export type GuestMessage =
  /** The guest's process waits for a scenario. */
  | { readonly type: 'ready' }
  | { readonly type: 'begin'; readonly check: string }
  | {
      readonly type: 'check';
      readonly check: string;
      readonly ok: boolean;
      readonly detail: string;
      readonly ms: number;
    }
  | { readonly type: 'note'; readonly topic: string; readonly body: unknown }
  /** The scenario is over. `error`: it ended with an exception outside a check. `left`: what it left behind in the guest. */
  | { readonly type: 'end'; readonly error: string | null; readonly left: readonly string[] }
  /** The init script's: the process that runs scenarios ended by itself. */
  | { readonly type: 'exit'; readonly status: number };

export type HostMessage =
  | { readonly type: 'note'; readonly topic: string; readonly body: unknown }
  /** Runs a scenario, whose first device is in place `first` among those of the machine. */
  | { readonly type: 'run'; readonly scenario: string; readonly first: number }
  /** There is no other: the process may end. */
  | { readonly type: 'over' };

/** The line on the console after which nothing of scenario `name` comes: the guest says that it is over when it has been written. */
export const lastLine = (name: string): string => `vipsec: ${name} is over`;

export function parseGuestMessage(line: string): GuestMessage | undefined {
  const message = parseObject(line);
  if (message === undefined) return undefined;
  const { type, check, ok, detail, ms, topic, body, error, left, status } = message;
  if (type === 'ready') return { type };
  if (type === 'begin' && typeof check === 'string') return { type, check };
  if (type === 'check' && typeof check === 'string' && typeof ok === 'boolean') {
    return { type, check, ok, detail: String(detail ?? ''), ms: Number(ms ?? 0) };
  }
  if (type === 'note' && typeof topic === 'string') return { type, topic, body };
  if (type === 'end' && (error === null || typeof error === 'string') && Array.isArray(left)) {
    return { type, error, left: left.map(String) };
  }
  if (type === 'exit' && typeof status === 'number') return { type, status };
  return undefined;
}

export function parseHostMessage(line: string): HostMessage | undefined {
  const message = parseObject(line);
  if (message === undefined) return undefined;
  const { type, topic, body, scenario, first } = message;
  if (type === 'note' && typeof topic === 'string') return { type, topic, body };
  if (type === 'run' && typeof scenario === 'string' && typeof first === 'number') return { type, scenario, first };
  return type === 'over' ? { type } : undefined;
}

function parseObject(line: string): Record<string, unknown> | undefined {
  try {
    const value: unknown = JSON.parse(line);
    return typeof value === 'object' && value !== null && !Array.isArray(value) ? { ...value } : undefined;
  } catch {
    return undefined;
  }
}

/** Notes by topic: each waits for its reader, or its reader for it. Used on both sides. */
export class Mailbox {
  readonly #waiting = new Map<string, unknown[]>();
  readonly #readers = new Map<string, ((body: unknown) => void)[]>();

  put(topic: string, body: unknown): void {
    const reader = this.#readers.get(topic)?.shift();
    if (reader !== undefined) reader(body);
    else this.#waiting.set(topic, [...(this.#waiting.get(topic) ?? []), body]);
  }

  /** The next note on `topic`. Rejects after `timeoutMs`, or when `signal` says that none will come. */
  take(topic: string, timeoutMs: number, signal?: AbortSignal): Promise<unknown> {
    const waiting = this.#waiting.get(topic);
    if (waiting !== undefined && waiting.length > 0) return Promise.resolve(waiting.shift());
    return new Promise((resolve, reject) => {
      const readers = this.#readers.get(topic) ?? [];
      this.#readers.set(topic, readers);
      const stop = (reason: Error | undefined) => {
        clearTimeout(timer);
        signal?.removeEventListener('abort', aborted);
        const at = readers.indexOf(reader);
        if (at >= 0) readers.splice(at, 1);
        if (reason !== undefined) reject(reason);
      };
      const reader = (body: unknown) => {
        stop(undefined);
        resolve(body);
      };
      const timer = setTimeout(() => stop(new Error(`no note on '${topic}' within ${timeoutMs} ms`)), timeoutMs);
      const aborted = () => stop(new Error(`no note on '${topic}' will come: the other side is gone`));
      signal?.addEventListener('abort', aborted, { once: true });
      readers.push(reader);
      if (signal?.aborted === true) aborted();
    });
  }
}
