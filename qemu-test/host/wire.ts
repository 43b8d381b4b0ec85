/** The host half of scenarios whose bodies talk to the other end of a wire: `guestPlace` is the other half. */
import { WireEnd, type WireRequest } from '../bodies/wire.ts';
import { describe } from '../guest/guest.ts';
import type { Host } from './host.ts';

/** No scenario takes longer. */
const LONG_MS = 3_600_000;

/** What the guest asks of a wire, by the id of the NIC whose it is; `null` when it asks no more. */
export type WireNote = { readonly nic: string; readonly request: WireRequest } | null;

/** Serves the wires of all NICs with link `host` until the guest says that it needs them no more. */
export async function serveWires(host: Host): Promise<void> {
  const ends = new Map<string, WireEnd>();
  for (;;) {
    const note = await host.hear('wire', LONG_MS);
    if (!isNote(note)) return;
    const { nic, request } = note;
    const end = ends.get(nic) ?? new WireEnd(host.link(nic), (up) => host.setLink(nic, up));
    ends.set(nic, end);
    end.serve(request).then(
      (answer) => host.tell(`wire ${nic}`, { answer }),
      (error: unknown) => host.tell(`wire ${nic}`, { error: describe(error) }),
    );
  }
}

function isNote(body: unknown): body is Exclude<WireNote, null> {
  return typeof body === 'object' && body !== null && 'nic' in body && 'request' in body;
}
