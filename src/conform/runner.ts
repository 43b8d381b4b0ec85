/**
 * Runs checks one after the other on one device.
 *
 * Each check finds the function reset and leaves it so. A check that loses the device has failed; the device is then
 * opened again for the next one. When that fails too, the remaining checks cannot be tried.
 */
import { VipsecError } from '../errors.ts';
import type { PciFunction } from '../vfio/function.ts';
import type { WireRevision } from '../virtio/revision.ts';
import { Bench } from './bench.ts';
import { type Check, type CheckResult, Failed, NotApplicable, Untestable, type Verdict } from './check.ts';
import { notAboutOctep } from './octep.ts';
import { findProfile, type Profile } from './profile.ts';
import type { RingFormat } from './ring.ts';
import { type FunctionDescription, Target } from './target.ts';
import { Patience } from './time.ts';

export interface ConformanceOptions {
  /** Opens the function under test; called again after a check has lost it. */
  readonly open: () => PciFunction;
  /** Opens the function at the other end of its link. */
  readonly openPeer?: () => PciFunction;
  /** Default `auto`: by the length of VIRTIO_NET_IPSEC_SA_CAP. */
  readonly wire?: WireRevision | 'auto';
  /** Format of the virtqueues, but for checks of one of them. Default `auto`: split, unless the device refuses. */
  readonly ring?: RingFormat | 'auto';
  /** Milliseconds that the device may take for an answer. Default 1000. */
  readonly timeout?: number;
  readonly checks: readonly Check[];
  /** Told before each check. */
  readonly onCheck?: (check: Check, place: number) => void;
  /** Ends the run before the next check. */
  readonly signal?: AbortSignal;
}

export interface ConformanceReport {
  readonly device: FunctionDescription & {
    readonly wire: WireRevision;
    readonly ring: RingFormat;
    /** How the other end of the link is reached. */
    readonly link: string;
  };
  readonly checks: readonly CheckResult[];
  /** Why the device is gone; null when it is there. */
  readonly lost: string | null;
}

/** How the other end of the link is reached, by what was found. */
const LINKS: Readonly<Record<string, string>> = { true: 'loopback', false: 'unknown', null: 'not asked' };
const DEFAULT_TIMEOUT = 1000;
/** A check's time, in timeouts. */
const TIMEOUTS_PER_CHECK = 8;

/** Runs all of `checks`. Throws what `open` throws at the beginning; later troubles are verdicts. */
export async function runConformance(options: ConformanceOptions): Promise<ConformanceReport> {
  const patience = new Patience(options.timeout ?? DEFAULT_TIMEOUT);
  const target = new Target(options.open);
  const peer = options.openPeer === undefined ? null : new Target(options.openPeer);
  try {
    target.connect();
    peer?.connect();
    const device = target.describe();
    const profile = await findProfile(target, patience, {
      wire: options.wire ?? 'auto',
      ring: options.ring ?? 'auto',
    });
    const run = new Run(target, peer, patience, profile, options);
    const checks = await run.all();
    const link = peer !== null ? 'peer' : LINKS[String(profile.loopback)];
    return { device: { ...device, wire: profile.revision, ring: profile.ring, link }, checks, lost: run.lost };
  } finally {
    target.close();
    peer?.close();
  }
}

class Run {
  lost: string | null = null;
  readonly #target: Target;
  readonly #peer: Target | null;
  readonly #patience: Patience;
  readonly #profile: Profile;
  readonly #options: ConformanceOptions;

  constructor(target: Target, peer: Target | null, patience: Patience, profile: Profile, options: ConformanceOptions) {
    this.#target = target;
    this.#peer = peer;
    this.#patience = patience;
    this.#profile = profile;
    this.#options = options;
  }

  async all(): Promise<CheckResult[]> {
    const results: CheckResult[] = [];
    for (const [place, check] of this.#options.checks.entries()) {
      if (this.#options.signal?.aborted === true) break;
      this.#options.onCheck?.(check, place);
      results.push(await this.#one(check));
    }
    return results;
  }

  async #one(check: Check): Promise<CheckResult> {
    const { id, section, level, title } = check;
    const start = performance.now();
    const result = (verdict: Verdict, detail: string): CheckResult => ({
      id,
      section,
      level,
      title,
      verdict,
      detail,
      duration: Math.round(performance.now() - start),
    });
    if ('untestable' in check) return result('untestable', check.untestable);
    if (!(await this.#ready())) return result('untestable', `the device is gone: ${this.lost}`);
    const elsewhere = notAboutOctep(section, this.#target.identity);
    if (elsewhere !== null) return result('not-applicable', elsewhere);
    const bench = new Bench(this.#target, this.#peer, this.#patience, this.#profile);
    this.#patience.deadline = start + TIMEOUTS_PER_CHECK * this.#patience.timeout;
    try {
      await check.run(bench);
      return result('pass', bench.story(false));
    } catch (error) {
      const [verdict, reason] = judge(error);
      const story = bench.story(verdict === 'fail');
      return result(verdict, [reason, story].filter((part) => part !== '').join('\n'));
    } finally {
      this.#patience.deadline = Number.POSITIVE_INFINITY;
      this.#target.tidy();
      this.#peer?.tidy();
    }
  }

  /** Opens what is not open. */
  async #ready(): Promise<boolean> {
    if (this.lost !== null) return false;
    try {
      this.#target.connect();
      this.#peer?.connect();
      await this.#target.prepare(this.#patience);
      await this.#peer?.prepare(this.#patience);
      return true;
    } catch (error) {
      if (!(error instanceof VipsecError)) throw error;
      this.lost = error.message;
      return false;
    }
  }
}

/** What an exception says about the device. */
function judge(error: unknown): [Verdict, string] {
  if (error instanceof NotApplicable) return ['not-applicable', error.message];
  if (error instanceof Untestable) return ['untestable', error.message];
  if (error instanceof Failed) return ['fail', error.message];
  // The device broke the session, a capability list, an object: it is to blame.
  if (error instanceof VipsecError) return ['fail', `${error.message} [${error.code}]`];
  throw error;
}
