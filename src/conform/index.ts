/**
 * A conformance suite for virtio network devices with IPsec (Virtio 1.4): a check for each normative statement about
 * the device that a driver can try, and the reason for each that it cannot.
 *
 * `runConformance` drives one function; `vipsec conform` is its command line.
 */
import type { Check } from './check.ts';
import { adminChecks } from './checks/admin.ts';
import { adminQueueChecks } from './checks/admin-queue.ts';
import { capabilityChecks } from './checks/capabilities.ts';
import { controlCountingChecks } from './checks/control-counting.ts';
import { controlReceiveChecks } from './checks/control-receive.ts';
import { controlSteeringChecks } from './checks/control-steering.ts';
import { flowFilterChecks } from './checks/flow-filter.ts';
import { flowMatchingChecks } from './checks/flow-matching.ts';
import { receivedChecks } from './checks/header.ts';
import { sentChecks } from './checks/header-sent.ts';
import { initChecks } from './checks/init.ts';
import { interruptChecks } from './checks/interrupts.ts';
import { ipsecChecks } from './checks/ipsec.ts';
import { ipsecTrafficChecks } from './checks/ipsec-traffic.ts';
import { memberCommandChecks } from './checks/member-commands.ts';
import { netConfigChecks } from './checks/net-config.ts';
import { objectChecks } from './checks/objects.ts';
import { packedQueueChecks } from './checks/packed-queues.ts';
import { pciChecks } from './checks/pci.ts';
import { pciNotifyChecks } from './checks/pci-notify.ts';
import { queueChecks } from './checks/queues.ts';
import { resetChecks } from './checks/reset.ts';
import { suspendChecks } from './checks/suspend.ts';

export {
  AREAS,
  type Area,
  areaOf,
  type Check,
  type CheckResult,
  type Level,
  type Trial,
  type Untried,
  type Verdict,
} from './check.ts';
export type { RingFormat } from './ring.ts';
export { type ConformanceOptions, type ConformanceReport, runConformance } from './runner.ts';

/** All checks, area by area. */
export const CHECKS: readonly Check[] = [
  ...pciChecks,
  ...pciNotifyChecks,
  ...interruptChecks,
  ...initChecks,
  ...netConfigChecks,
  ...resetChecks,
  ...suspendChecks,
  ...queueChecks,
  ...packedQueueChecks,
  ...controlReceiveChecks,
  ...controlSteeringChecks,
  ...controlCountingChecks,
  ...adminChecks,
  ...adminQueueChecks,
  ...memberCommandChecks,
  ...capabilityChecks,
  ...objectChecks,
  ...flowFilterChecks,
  ...flowMatchingChecks,
  ...ipsecChecks,
  ...ipsecTrafficChecks,
  ...sentChecks,
  ...receivedChecks,
];
