/** Scapy as a peer: many requests in one Python process, see `scapy_peer.py`. */
import { spawnSync } from 'node:child_process';
import type { SaText } from './matrix.ts';

export interface ScapyRequest {
  readonly op: 'encrypt' | 'decrypt';
  readonly sa: SaText;
  /** An IP packet, as hex. */
  readonly packet: string;
  /** 64-bit sequence number of the packet, decimal. */
  readonly sequence: string;
}

export type ScapyAnswer = { readonly packet: string } | { readonly error: string } | { readonly unsupported: string };

const PYTHON = '/usr/bin/python3';
const SCRIPT = new URL('scapy_peer.py', import.meta.url).pathname;

/** Asks Scapy all of `requests`; one answer each, in order. Throws when Scapy cannot be run at all. */
export function askScapy(requests: readonly ScapyRequest[]): ScapyAnswer[] {
  const input = requests.map((request) => JSON.stringify(request)).join('\n');
  const run = spawnSync(PYTHON, [SCRIPT], { input, encoding: 'utf8', maxBuffer: 1 << 28, timeout: 110_000 });
  if (run.error !== undefined) throw run.error;
  if (run.status !== 0) throw new Error(`Scapy ended with ${run.status}: ${run.stderr.slice(-2000)}`);
  const lines = run.stdout.trimEnd().split('\n');
  if (lines.length !== requests.length)
    throw new Error(`Scapy gave ${lines.length} answers to ${requests.length} requests`);
  return lines.map((line): ScapyAnswer => JSON.parse(line));
}
