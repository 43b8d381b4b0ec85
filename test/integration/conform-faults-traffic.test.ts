import { testFaults } from './conform-support.ts';

testFaults(['QUE', 'PKD', 'FLT', 'IPS', 'HDR']);
