/**
 * How far an SA in software has come, for it to go on in another place: sequence number, IV, replay window, lifetime, counters, and
 * which keys it has had. No key: whoever goes on with it brings that.
 */
import { IpsecError } from '../errors.ts';
import type { DataPath } from './burst.ts';
import type { LifetimeProgress } from './lifetime.ts';
import { RECORD, SaKind, type SaTable, SaWord } from './sa-table.ts';
import { VERDICTS } from './verdict.ts';

/** Stand for keys; equal ones for equal keys. */
export interface Fingerprints {
  /** Key and salt, whatever they are used for: two modes with one key and one nonce share their key stream. */
  readonly nonces: string;
  /** Whether an old packet passes the ICV hangs on this: key and salt of an AEAD, else the key of the authenticator. */
  readonly icv: string;
}

/** Which keys an SA has, and has had. */
export interface KeyHistory {
  /** What the fingerprints are made with. */
  readonly secret: Uint8Array;
  readonly keys: Fingerprints;
  /** Fingerprints of keys that this SA has had. Outbound: what makes nonces, which it must not come back to. */
  readonly sentWith: Set<string>;
  /** Inbound: what authenticates, and the highest number accepted with it. */
  readonly acceptedWith: Map<string, bigint>;
}

/** Plain data, which a message can carry. */
export interface SoftwareProgress extends KeyHistory {
  /** Words of the record: `sequenceLow` and `sequenceHigh`. */
  readonly sequence: readonly [low: number, high: number];
  /** Outbound: `ivLow` and `ivHigh`. Inbound: null. */
  readonly iv: readonly [low: number, high: number] | null;
  /** Inbound: the blocks of the replay window, none without; and ICV failures in a row. Outbound: null. */
  readonly window: Uint32Array | null;
  readonly failures: number;
  readonly lifetime: LifetimeProgress;
  /** By `Verdict`. */
  readonly dropped: Float64Array;
}

/** How far the SA in `slot` has come. */
export function progressOf(path: DataPath, slot: number, history: KeyHistory): SoftwareProgress {
  const { table, lifetimes } = path;
  const { words, windows } = table;
  const record = slot * RECORD;
  const outbound = (words[record + SaWord.kind] & SaKind.outbound) !== 0;
  const lifetime = lifetimes[slot];
  if (lifetime === undefined) throw new IpsecError('NO_SUCH_SA', `slot ${slot} has no SA`);
  const { secret, keys, sentWith, acceptedWith } = history;
  return {
    ...{ secret: secret.slice(), keys, sentWith, acceptedWith },
    sequence: [words[record + SaWord.sequenceLow], words[record + SaWord.sequenceHigh]],
    iv: outbound ? [words[record + SaWord.ivLow], words[record + SaWord.ivHigh]] : null,
    window: outbound ? null : windows.slice(...windowRange(table, record)),
    failures: outbound ? 0 : words[record + SaWord.failures],
    lifetime: lifetime.progress(words, record),
    dropped: table.dropped.slice(slot * VERDICTS, (slot + 1) * VERDICTS),
  };
}

/**
 * The SA whose new record is in `slot`, with `keys`, goes on. Throws IpsecError `SA_MOVE` when it is another one: other keys, the other
 * direction, or another replay window. What its lifetime has used is for `SaLifetime`.
 */
export function goOn(path: DataPath, slot: number, progress: SoftwareProgress, keys: Fingerprints): void {
  const { table } = path;
  const { words, windows } = table;
  const record = slot * RECORD;
  const outbound = (words[record + SaWord.kind] & SaKind.outbound) !== 0;
  const [from, to] = outbound ? [0, 0] : windowRange(table, record);
  const sameKeys = keys.nonces === progress.keys.nonces && keys.icv === progress.keys.icv;
  if (!sameKeys || outbound !== (progress.iv !== null) || to - from !== (progress.window?.length ?? 0)) {
    throw new IpsecError('SA_MOVE', 'the SA that is to go on is another one');
  }
  [words[record + SaWord.sequenceLow], words[record + SaWord.sequenceHigh]] = progress.sequence;
  if (progress.iv !== null) {
    [words[record + SaWord.ivLow], words[record + SaWord.ivHigh]] = progress.iv;
    words[record + SaWord.kind] &= ~SaKind.givenIv;
  } else {
    words[record + SaWord.failures] = progress.failures;
    if (progress.window !== null) windows.set(progress.window, from);
  }
  const { told } = progress.lifetime;
  if (told.includes('soft-packets') || told.includes('soft-bytes')) words[record + SaWord.kind] |= SaKind.softExpired;
  table.dropped.set(progress.dropped, slot * VERDICTS);
}

/** Where the replay window of the inbound SA at `record` lies; empty without. */
function windowRange({ words }: SaTable, record: number): [from: number, to: number] {
  if (words[record + SaWord.window] === 0) return [0, 0];
  const from = words[record + SaWord.windowBase];
  return [from, from + words[record + SaWord.windowMask] + 1];
}
