/**
 * A peer by hand over the arithmetic of Python's `cryptography`, for every transform there is: Scapy knows no AES-XCBC, no GMAC, no
 * short ICV of AES-GCM, and no 64-bit numbers with a separate authenticator.
 */
import { spawnSync } from 'node:child_process';
import { afterAll, describe, expect, it } from 'vitest';
import { TRANSFORMS } from '../../src/fallback/engines/transform.ts';
import { CASES, realPackets } from './matrix.ts';
import { Ours } from './ours.ts';

type Answer = { readonly inner: string; readonly sealed: string } | { readonly error: string };

const PYTHON = '/usr/bin/python3';
const SCRIPT = new URL('cryptography_peer.py', import.meta.url).pathname;

const ours = new Ours();
afterAll(() => ours[Symbol.dispose]());

const hex = (bytes: Uint8Array) => Buffer.from(bytes).toString('hex');
const bytesOf = (text: string) => Uint8Array.from(Buffer.from(text, 'hex'));
const PACKETS = { 4: realPackets(4, 5), 6: realPackets(6, 5) } as const;
/** Each case with one packet, of all sizes in turn. */
const trials = CASES.map((one, i) => ({ ...one, packet: PACKETS[one.inner][i % PACKETS[one.inner].length] }));

function ask(wire: readonly string[]): Answer[] {
  const input = trials.map(({ sa }, i) => JSON.stringify({ sa, packet: wire[i], sequence: sa.initial.sequence }));
  const run = spawnSync(PYTHON, [SCRIPT], {
    input: input.join('\n'),
    encoding: 'utf8',
    maxBuffer: 1 << 28,
    timeout: 110_000,
  });
  if (run.error !== undefined) throw run.error;
  if (run.status !== 0) throw new Error(`the peer ended with ${run.status}: ${run.stderr.slice(-2000)}`);
  return run.stdout
    .trimEnd()
    .split('\n')
    .map((line): Answer => JSON.parse(line));
}

describe('a peer over the arithmetic of cryptography', () => {
  const wire = trials.map(({ sa, packet }) => hex(ours.protect(sa, packet)));
  const answers = ask(wire);

  it('is asked about every transform', () => {
    const asked = new Set(CASES.map(({ name }) => name.split(' ')[1]));
    expect(asked.size).toBe(TRANSFORMS.length);
    expect(answers.length).toBe(trials.length);
  });

  it('opens every packet that we protect and finds the original in it', () => {
    const complaints = answers.flatMap((answer, i) => {
      const { name, packet } = trials[i];
      if ('error' in answer) return [`${name}: ${answer.error}`];
      return answer.inner === hex(packet) ? [] : [`${name}: took out ${answer.inner}`];
    });
    expect(complaints.slice(0, 20)).toEqual([]);
  });

  it('protects packets that we open', () => {
    const complaints = answers.flatMap((answer, i) => {
      const { name, packet, sa } = trials[i];
      if ('error' in answer) return [`${name}: ${answer.error}`];
      const initial = { sequence: String(BigInt(sa.initial.sequence) + 1n) };
      try {
        const opened = hex(ours.unprotect({ ...sa, initial }, bytesOf(answer.sealed)));
        return opened === hex(packet) ? [] : [`${name}: we took out ${opened}`];
      } catch (error) {
        return [`${name}: ${error instanceof Error ? error.message : error}`];
      }
    });
    expect(complaints.slice(0, 20)).toEqual([]);
  });

  it('refuses what was changed', () => {
    const changed = wire.map((packet) => {
      const bytes = bytesOf(packet);
      bytes[bytes.length - 20] ^= 1;
      return hex(bytes);
    });
    const accepted = ask(changed).flatMap((answer, i) => ('error' in answer ? [] : [trials[i].name]));
    expect(accepted).toEqual([]);
  });
});
