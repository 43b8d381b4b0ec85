import { afterAll, describe, expect, it } from 'vitest';
import { CASES, type Case, realPackets } from './matrix.ts';
import { Ours } from './ours.ts';
import { askScapy, type ScapyAnswer } from './scapy.ts';

/** How many of our transforms Scapy 2.5 knows. */
const SCAPY_TRANSFORMS = 58;

const ours = new Ours();
afterAll(() => ours[Symbol.dispose]());

const hex = (bytes: Uint8Array) => Buffer.from(bytes).toString('hex');
const PACKETS = { 4: realPackets(4, 5), 6: realPackets(6, 5) } as const;

/** Each case with one packet, of five sizes in turn; there are six modes and families of each transform. */
const trials = CASES.map((one, i) => ({ ...one, packet: PACKETS[one.inner][i % PACKETS[one.inner].length] }));
type Trial = Case & { packet: Uint8Array };

/** What is compared after decapsulation: everything but fields that the peer may rewrite in transport mode (none of ours). */
function attempt(run: () => Uint8Array): string {
  try {
    return hex(run());
  } catch (error) {
    return `error: ${error instanceof Error ? error.message : error}`;
  }
}

function failures(answers: readonly ScapyAnswer[], judge: (trial: Trial, packet: string) => string | null): string[] {
  const found: string[] = [];
  for (const [i, answer] of answers.entries()) {
    const trial = trials[i];
    if ('unsupported' in answer) continue;
    const complaint = 'error' in answer ? `Scapy: ${answer.error}` : judge(trial, answer.packet);
    if (complaint !== null) found.push(`${trial.name}, ${trial.packet.length} bytes: ${complaint}`);
  }
  return found;
}

/** Names of the transforms that Scapy judged at least once. */
function judged(answers: readonly ScapyAnswer[]): Set<string> {
  return new Set(trials.filter((_, i) => !('unsupported' in answers[i])).map((trial) => trial.name.split(' ')[1]));
}

describe('Scapy', () => {
  it('accepts every packet that we protect and finds the original in it', () => {
    const wire = trials.map((trial) => attempt(() => ours.protect(trial.sa, trial.packet)));
    const refused = wire.flatMap((packet, i) => (packet.startsWith('error') ? [`${trials[i].name}: ${packet}`] : []));
    expect(refused.slice(0, 20)).toEqual([]);
    const answers = askScapy(
      trials.map((trial, i) => ({ op: 'decrypt', sa: trial.sa, packet: wire[i], sequence: trial.sa.initial.sequence })),
    );
    const complaints = failures(answers, (trial, packet) =>
      packet === hex(trial.packet) ? null : `took out ${packet}`,
    );
    expect(complaints.slice(0, 20)).toEqual([]);
    // What Scapy does not know at all: GMAC, AES-XCBC, and AEADs with a short ICV (CCM excepted).
    expect([...judged(answers)].filter((id) => /xcbc|gmac|gcm-(8|12)$/.test(id))).toEqual([]);
    expect(judged(answers).size).toBe(SCAPY_TRANSFORMS);
  });

  it('produces packets that we accept and find the original in', () => {
    const answers = askScapy(
      trials.map((trial) => ({
        op: 'encrypt',
        sa: trial.sa,
        packet: hex(trial.packet),
        sequence: trial.sa.initial.sequence,
      })),
    );
    const complaints = failures(answers, (trial, packet) => {
      const result = attempt(() => ours.unprotect(trial.sa, Buffer.from(packet, 'hex')));
      return result === hex(trial.packet) ? null : `we took out ${result}`;
    });
    expect(complaints.slice(0, 20)).toEqual([]);
    expect(judged(answers).size).toBe(SCAPY_TRANSFORMS);
  });
});
