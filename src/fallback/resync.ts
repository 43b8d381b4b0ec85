/**
 * Finding the subspace of extended sequence numbers again when 2^32 or more packets in a row were lost, after which every packet fails its ICV
 * (RFC 4303, A2.3; RFC 4302, B2.3): `Resync` in `sequence.ts` says how often, and with how many high halves.
 */
import { At, type DataPath } from './burst.ts';
import { RECORD, SaWord } from './sa-table.ts';
import { Resync } from './sequence.ts';
import { VERDICTS, Verdict } from './verdict.ts';

/** The packet at `position` is to be tried again if it fails: keeps its bytes from `start` to `end`, which the first try changes. */
export function keepCandidate(path: DataPath, position: number, start: number, end: number): void {
  const size = end - start;
  path.candidate = position;
  if (path.copy.length < size) path.copy = new Uint8Array(size);
  path.copy.set(path.pool.u8.subarray(start, end));
}

/** Whether the candidate of this run, if there is one, has failed. */
export function shouldResynchronize(path: DataPath, base: number, verdicts: Uint8Array): boolean {
  // hot:
  const { candidate } = path;
  return candidate >= 0 && !path.resyncing && verdicts[base + candidate] === Verdict.icv;
}

/**
 * Tries the candidate, of which bytes `start` to `end` were kept, with the next high halves: `again` takes it, alone, from the burst's order. It has
 * been counted as dropped; the attempts are not.
 */
export function resynchronize(
  path: DataPath,
  base: number,
  start: number,
  end: number,
  verdicts: Uint8Array,
  again: () => void,
): void {
  const { burst, pool, table, candidate: position } = path;
  const record = burst.state[(position << 3) + At.record];
  const inferred = burst.state[(position << 3) + At.high];
  const icvDrops = (record / RECORD) * VERDICTS + Verdict.icv;
  const counted = table.dropped[icvDrops];
  path.resyncing = true;
  for (let step = 1; step <= Resync.candidates; step++) {
    pool.u8.set(path.copy.subarray(0, end - start), start);
    path.forcedHigh = (inferred + step) | 0;
    burst.order[0] = position;
    again();
    if (verdicts[base + position] !== Verdict.icv) break;
  }
  path.resyncing = false;
  path.candidate = -1;
  table.words[record + SaWord.failures] = 0;
  table.dropped[icvDrops] = verdicts[base + position] === Verdict.icv ? counted : counted - 1;
}
