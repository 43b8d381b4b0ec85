/** SAs on the device with their other ends, and traffic through them. */
import type { SecurityAssociation } from '../ipsec/sa.ts';
import { IpProtocol } from '../packet/fields.ts';
import { ResourceType as R } from '../virtio/admin-wire.ts';
import { encodeGroup, FlowFilterAction } from '../virtio-net/flow-filter-wire.ts';
import { NetHeaderFlag } from '../virtio-net/header.ts';
import type { Bench } from './bench.ts';
import { expect, need } from './check.ts';
import type { AdminConsole } from './console.ts';
import type { Driver, Received } from './driver.ts';
import { type FrameOptions, isEqual, protocolOf, udpFrame } from './frames.ts';
import { Judge } from './judge.ts';
import type { Network } from './network.ts';
import { type Offer, offeredCapabilities, succeeded } from './offer.ts';
import {
  type Algorithms,
  algorithmsOf,
  classification,
  classifierBytes,
  type Match,
  makeSa,
  ruleBytes,
  type SaWish,
  saBytes,
} from './samples.ts';

/** A device with IPsec in use, the other side of its link, and somebody who has the keys. */
export interface Secured {
  readonly driver: Driver;
  readonly network: Network;
  readonly admin: AdminConsole;
  readonly offer: Offer;
  readonly judge: Judge;
}

/** Runs `work` with all of that. */
export async function withSecured(bench: Bench, work: (secured: Secured) => Promise<void>): Promise<void> {
  const { driver, network } = await bench.network({ ipsec: true });
  const admin = bench.console(driver);
  const offer = await offeredCapabilities(admin);
  using judge = new Judge();
  await work({ driver, network, admin, offer, judge });
}

export type Protocol = 'esp' | 'ah';
export type Mode = 'tunnel' | 'transport';

/** The algorithms of a mode; not applicable when the device lacks it. */
export function needAlgorithms(
  offer: Offer,
  protocol: Protocol,
  mode: Mode,
): { name: string; algorithms: Algorithms }[] {
  const list = algorithmsOf(offer, protocol, mode);
  need(list.length > 0, `the device does not offer ${protocol.toUpperCase()} ${mode} mode`);
  return list;
}

/** An outbound SA on the device, object `id`, and its other end at the judge. */
export async function outboundSa(
  secured: Secured,
  id: number,
  wish: Omit<SaWish, 'direction'>,
  algorithms: Algorithms,
): Promise<SecurityAssociation> {
  const { admin, judge } = secured;
  const sa = makeSa({ ...wish, direction: 'outbound' }, algorithms);
  // The other end must not change the packet in its turn.
  const { esn = false } = wish.options ?? {};
  judge.add(makeSa({ ...wish, options: { esn }, lifetime: {}, direction: 'inbound' }, algorithms));
  succeeded(await admin.create(R.NET_IPSEC_OUTB_SA, id, saBytes(admin.revision, sa, id)));
  return sa;
}

/** An inbound SA on the device, object `id`, and its other end at the judge: the judge's handle. */
export async function inboundSa(
  secured: Secured,
  id: number,
  wish: Omit<SaWish, 'direction'>,
  algorithms: Algorithms,
): Promise<number> {
  const { admin, judge } = secured;
  const sa = makeSa({ ...wish, direction: 'inbound' }, algorithms);
  succeeded(await admin.create(R.NET_IPSEC_INB_SA, id, saBytes(admin.revision, sa, id)));
  return judge.add(makeSa({ ...wish, lifetime: {}, replayWindow: 0, direction: 'outbound' }, algorithms));
}

/** A rule that sends every packet of a protocol to IPsec: group, classifier and rule with this id. */
export async function ipsecRule(
  { admin, offer }: Secured,
  match: Match,
  options: { id?: number; action?: number } = {},
): Promise<void> {
  const action = options.action ?? FlowFilterAction.ipsec;
  const id = options.id ?? 0;
  need(offer.actions.includes(action), 'the device does not offer that action');
  const classified = classification(offer, match);
  succeeded(await admin.create(R.NET_FF_GROUP, id, encodeGroup({ priority: 100 + id })));
  succeeded(await admin.create(R.NET_FF_CLASSIFIER, id, classifierBytes(classified)));
  succeeded(
    await admin.create(R.NET_FF_RULE, id, ruleBytes(classified, { group: id, classifier: id, priority: 1, action })),
  );
}

/** Matches all packets of ESP or AH over IPv4. */
export function protocolMatch(protocol: Protocol): Match {
  return { protocol: protocol === 'esp' ? IpProtocol.esp : IpProtocol.ah };
}

/** Header fields of a packet for outbound SA `id`. */
export function tagged(id: number) {
  return { flags: NetHeaderFlag.SECURITY, resourceId: id, resourceType: R.NET_IPSEC_OUTB_SA };
}

/** Sends a packet through outbound SA `id`, and returns what came out of the device. */
export async function sendSecured(
  { network }: Secured,
  id: number,
  options: Partial<FrameOptions> = {},
): Promise<{ plain: Uint8Array; wire: Uint8Array }> {
  const plain = udpFrame({ ...network.outward, ...options });
  await network.send(plain, tagged(id));
  return { plain, wire: await network.departure('the packet for the SA') };
}

/** The judge must find `plain` in `wire`, but for what forwarding changes. */
export function expectOpens(
  { judge }: Secured,
  wire: Uint8Array,
  plain: Uint8Array,
  protocol: Protocol,
  what: string,
): void {
  const number = protocolOf(wire);
  const wanted = protocol === 'esp' ? IpProtocol.esp : IpProtocol.ah;
  expect(
    number === wanted || number === IpProtocol.udp,
    `${what}: the packet left as IP protocol ${number}, not ${wanted}`,
  );
  const { verdict, frame } = judge.open(wire);
  expect(frame !== null, `${what}: the other end of the SA says ${verdict}`);
  expect(isEqual(frame, plain), `${what}: the other end of the SA finds other bytes`);
}

/** Sends a protected frame to the device; what arrives. */
export async function arrive({ network }: Secured, wire: Uint8Array, what: string): Promise<Received> {
  await network.inject(wire);
  return await network.arrival(what);
}
