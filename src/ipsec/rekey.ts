/**
 * Rekeying without a gap: a pair of SAs, outbound and inbound, that is replaced by another pair while traffic runs (RFC 7296, 2.8).
 *
 * ```
 *   prepare      new inbound, then new outbound; nothing is sent with it        failure: all is as it was
 *   switchOver   at one point, between two bursts, packets go out with the new outbound SA
 *   grace        the old inbound SA still takes what the peer had sent, the old outbound what an application had tagged
 *   retirement   old outbound, then old inbound are removed
 * ```
 *
 * Both peers prepare before either switches: then there is no packet that its receiver has no SA for. An IKE daemon prepares when
 * it has the keys; the initiator switches when it has the responder's answer, the responder when it sees the new SA in use.
 * `rekey` does all of it in one call, for whoever has one.
 *
 * Left out: the negotiation. Who asks for it is told by `onDue`.
 */
import { IpsecError } from '../errors.ts';
import type { AddSaOptions, Ipsec, SaHandle, SaNotification } from './ipsec.ts';
import type { SecurityAssociationInput } from './validate.ts';

export interface SaPairInput {
  readonly outbound: SecurityAssociationInput;
  readonly inbound: SecurityAssociationInput;
}

export interface SaPairOptions extends AddSaOptions {
  /** How long the old SAs stay after the switch, in milliseconds. Default 10000. */
  readonly graceMs?: number;
}

export interface RekeyOptions {
  /** Resolves when the peer has prepared too. Without it the switch is made at once. When it rejects, all is as it was. */
  readonly peerReady?: () => Promise<void>;
}

const DEFAULT_GRACE_MS = 10_000;

/** The longest time that a timer of Node takes. */
const LONGEST_GRACE_MS = 2 ** 31 - 1;

/** Two SAs that live and end together. */
interface Generation {
  readonly outbound: SaHandle;
  readonly inbound: SaHandle;
}

/** SAs that are there and not yet used. Either `switchOver` or `abandon` is called, once. */
export interface PreparedPair extends Generation {
  /** From the next packet on the new outbound SA is used. The old SAs retire. */
  switchOver(): Retirement;
  /** Removes the new SAs. */
  abandon(): Promise<void>;
}

/** The end of the SAs that were replaced. */
export interface Retirement {
  /** Resolves when they are gone; rejects with what the device said when they could not be removed. */
  readonly done: Promise<void>;
  /** Ends the grace period: the peer has said that it needs them no more. Returns `done`. */
  now(): Promise<void>;
}

export class SaPair implements AsyncDisposable {
  /**
   * The number in `handle`, in shared memory: a worker thread that has been given this array reads element 0 for each burst. It changes once
   * the thread has acknowledged the new SA.
   */
  readonly current = new Uint32Array(new SharedArrayBuffer(4));
  readonly #ipsec: Ipsec;
  readonly #options: SaPairOptions;
  readonly #listeners = new Set<(notification: SaNotification) => void>();
  #current: Generation;
  /** Handles of all inbound SAs of the pair, also old and prepared ones. */
  readonly #inbound = new Set<number>();
  readonly #retiring = new Set<Retirement>();
  #prepared: PreparedPair | null = null;
  #preparing = false;
  #due = false;
  #stopListening: () => void = () => {};
  #closed = false;

  private constructor(ipsec: Ipsec, first: Generation, options: SaPairOptions) {
    this.#ipsec = ipsec;
    this.#options = options;
    this.#current = first;
    this.current[0] = first.outbound.handle;
    this.#inbound.add(first.inbound.handle);
    this.#stopListening = ipsec.onSaEvent((notification) => this.#tell(notification));
  }

  /** Makes both SAs, or none. Throws what `Ipsec.addSa` throws, IpsecError `SA_PAIR`. */
  static async open(ipsec: Ipsec, sas: SaPairInput, options: SaPairOptions = {}): Promise<SaPair> {
    const { graceMs = DEFAULT_GRACE_MS } = options;
    if (!(graceMs >= 0 && graceMs <= LONGEST_GRACE_MS)) {
      throw new IpsecError('SA_PAIR', `a grace period of ${graceMs} ms: 0 to ${LONGEST_GRACE_MS} is possible`);
    }
    return new SaPair(ipsec, await make(ipsec, sas, options), options);
  }

  /** For `pool.sa[p]` of packets to be sent: read it for each burst. */
  get handle(): number {
    return this.current[0];
  }

  get outbound(): SaHandle {
    return this.#current.outbound;
  }

  get inbound(): SaHandle {
    return this.#current.inbound;
  }

  /** hot: whether a received packet with SA `handle` came through this pair, be it through an SA that retires or is prepared. */
  accepts(handle: number): boolean {
    return this.#inbound.has(handle);
  }

  /**
   * Calls `listener` when it is time to negotiate new SAs: once per generation, when one of the current SAs nears an end (soft expiry, few
   * sequence numbers left) or has come to it. Returns how to stop.
   */
  onDue(listener: (notification: SaNotification) => void): () => void {
    this.#listeners.add(listener);
    return () => this.#listeners.delete(listener);
  }

  /**
   * Makes the next SAs beside the current ones, on the queues on which these are now: the inbound one first, so that the peer may use it as soon as it
   * knows of it. Throws what
   * `Ipsec.addSa` throws, IpsecError `SA_PAIR` when there are prepared SAs already or the pair is closed; then nothing has changed.
   */
  async prepare(next: SaPairInput): Promise<PreparedPair> {
    if (this.#closed) throw new IpsecError('SA_PAIR', 'the pair of SAs is closed');
    if (this.#preparing || this.#prepared !== null) {
      throw new IpsecError('SA_PAIR', 'the pair of SAs has its next SAs already');
    }
    this.#preparing = true;
    try {
      const made = await make(this.#ipsec, next, this.#options, this.#current);
      this.#inbound.add(made.inbound.handle);
      const prepared = this.#prepare(made);
      this.#prepared = prepared;
      if (!this.#closed) return prepared;
      await prepared.abandon();
      throw new IpsecError('SA_PAIR', 'the pair of SAs is closed');
    } finally {
      this.#preparing = false;
    }
  }

  /** Replaces both SAs. Resolves at the switch, and gives the retirement of the old ones. Throws like `prepare`. */
  async rekey(next: SaPairInput, options: RekeyOptions = {}): Promise<Retirement> {
    const prepared = await this.prepare(next);
    try {
      await options.peerReady?.();
    } catch (error) {
      await prepared.abandon();
      throw error;
    }
    return prepared.switchOver();
  }

  /** Removes all SAs of the pair, without grace. Idempotent. */
  async close(): Promise<void> {
    if (this.#closed) return;
    this.#closed = true;
    this.#stopListening();
    const ends = [...this.#retiring].map((one) => one.now());
    if (this.#prepared !== null) ends.push(this.#prepared.abandon());
    ends.push(this.#remove(this.#current));
    const failed = (await Promise.allSettled(ends)).find((one) => one.status === 'rejected');
    if (failed !== undefined) throw failed.reason;
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.close();
  }

  #prepare(made: Generation): PreparedPair {
    let over = false;
    const take = () => {
      if (over) throw new IpsecError('SA_PAIR', 'the prepared SAs were used or abandoned before');
      over = true;
      this.#prepared = null;
    };
    return {
      ...made,
      switchOver: () => {
        take();
        const old = this.#current;
        this.#current = made;
        this.current[0] = made.outbound.handle;
        this.#due = false;
        return this.#retire(old);
      },
      abandon: async () => {
        take();
        await this.#remove(made);
      },
    };
  }

  #retire(old: Generation): Retirement {
    const { graceMs = DEFAULT_GRACE_MS } = this.#options;
    let end: () => void = () => {};
    const grace = new Promise<void>((resolve) => {
      end = resolve;
    });
    const timer = setTimeout(end, graceMs);
    timer.unref();
    const done = grace.then(() => this.#remove(old)).finally(() => this.#retiring.delete(retirement));
    // Whoever wants to know looks at `done`.
    done.catch(() => {});
    const retirement: Retirement = {
      done,
      now: () => {
        clearTimeout(timer);
        end();
        return done;
      },
    };
    this.#retiring.add(retirement);
    return retirement;
  }

  async #remove({ outbound, inbound }: Generation): Promise<void> {
    try {
      await outbound.remove();
    } finally {
      this.#inbound.delete(inbound.handle);
      await inbound.remove();
    }
  }

  #tell(notification: SaNotification): void {
    const { sa } = notification;
    if (this.#due || (sa !== this.#current.outbound && sa !== this.#current.inbound)) return;
    this.#due = true;
    for (const listener of this.#listeners) listener(notification);
  }
}

/** Both SAs or none, the inbound one first. With `before` each goes where the one is that it follows. */
async function make(
  ipsec: Ipsec,
  { outbound, inbound }: SaPairInput,
  options: SaPairOptions,
  before: Generation | null = null,
): Promise<Generation> {
  if (outbound.direction !== 'outbound' || inbound.direction !== 'inbound') {
    throw new IpsecError('SA_PAIR', 'a pair is an outbound and an inbound SA', { path: 'direction' });
  }
  const where = (sa: SaHandle | undefined): AddSaOptions => {
    // An inbound SA of the device is on all queues; should the next one be in software, it is where the first was to be.
    const onAll = sa?.direction === 'inbound' && sa.placement.where === 'inline';
    const queue = sa === undefined || onAll ? options.queue : (sa.queue ?? undefined);
    return {
      ...(options.require === undefined ? {} : { require: options.require }),
      ...(queue === undefined ? {} : { queue }),
    };
  };
  const first = await ipsec.addSa(inbound, where(before?.inbound));
  try {
    return { inbound: first, outbound: await ipsec.addSa(outbound, where(before?.outbound)) };
  } catch (error) {
    await first.remove().catch(() => {});
    throw error;
  }
}
